"""Reading what is to be traced, and saying how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from activation_store.tracing.example_table import picture_digest
from concepts.schema import Example
from groundscope.core.errors import DataError
from groundscope.core.progress import display

if TYPE_CHECKING:
    from PIL import Image

    from lvlm.model import Encoding, Lvlm


def check_images(examples: Sequence[Example], *, progress: bool) -> dict[str, str]:
    """Return the digest of each example's picture by its id; each is read once, before any forward.

    Raises
    ------
    DataError
        Names the first example whose image cannot be read.
    """
    identities = [e.image.identity for e in examples]
    first = dict(zip(reversed(identities), reversed(examples), strict=True))
    digests: dict[str, str] = {}
    with progress_bar("checking images", len(first), 0, progress=progress) as advance:
        for identity, example in reversed(first.items()):
            digests[identity] = picture_digest(_load(example))
            advance(1, "")
    return {e.id: digests[identity] for e, identity in zip(examples, identities, strict=True)}


def unreadable_images(examples: Sequence[Example], *, progress: bool) -> dict[str, str]:
    """Return why the image of an example cannot be read, by the example's id, of those whose image cannot."""
    reasons: dict[str, str] = {}
    known: dict[str, str] = {}
    with progress_bar("checking images", len(examples), 0, progress=progress) as advance:
        for example in examples:
            identity = example.image.identity
            if identity not in known:
                try:
                    _load(example)
                    known[identity] = ""
                except DataError as error:
                    known[identity] = str(error.__cause__ or error).splitlines()[0]
            if known[identity]:
                reasons[example.id] = known[identity]
            advance(1, "")
    return reasons


def _load(example: Example) -> Image.Image:
    try:
        return example.image.load()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of them for files it cannot decode
        msg = f"example '{example.id}': its image cannot be read: {error}; leave it out, repair it, or say on_error='skip'"
        raise DataError(msg) from error


def encode_first(model: Lvlm, example: Example) -> Encoding:
    """Encode an example; raises `DataError` naming it where its image cannot be read."""
    _load(example)
    return model.encode(example)


@contextmanager
def progress_bar(what: str, total: int, done: int, *, progress: bool) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that advances a progress bar by some examples, or has it say something."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f}/s" if speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with display(*columns, show=None if progress else False) as bar:
        task = bar.add_task(what, total=total, completed=done)

        def advance(count: int, note: str) -> None:
            if note and not bar.disable:
                bar.console.print(note)
            bar.advance(task, count)

        yield advance
