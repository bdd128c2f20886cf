"""Read the images of the examples to trace, and show progress."""

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
    """Return the digest of each example's image by example id; each image is read once, before any forward pass.

    Raises
    ------
    DataError
        If an image cannot be read; the message names the first such example.
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
    """Return the error message for each example whose image cannot be read, by example id."""
    reasons: dict[str, str] = {}
    problems: dict[str, str] = {}
    with progress_bar("checking images", len(examples), 0, progress=progress) as advance:
        for example in examples:
            identity = example.image.identity
            if identity not in problems:
                try:
                    _load(example)
                    problems[identity] = ""
                except DataError as error:
                    problems[identity] = str(error.__cause__ or error).splitlines()[0]
            if problems[identity]:
                reasons[example.id] = problems[identity]
            advance(1, "")
    return reasons


def _load(example: Example) -> Image.Image:
    try:
        return example.image.load()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of them for files it cannot decode
        msg = f"example '{example.id}': its image cannot be read: {error}; repair it, remove the example, or set on_error='skip'"
        raise DataError(msg) from error


def encode_first(model: Lvlm, example: Example) -> Encoding:
    """Encode an example; raise `DataError`, which names it, if its image cannot be read."""
    _load(example)
    return model.encode(example)


@contextmanager
def progress_bar(label: str, total: int, done: int, *, progress: bool) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that advances a progress bar by a number of examples, and prints a note if it is not empty."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f}/s" if speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with display(*columns, show=None if progress else False) as bar:
        task = bar.add_task(label, total=total, completed=done)

        def advance(count: int, note: str) -> None:
            if note and not bar.disable:
                bar.console.print(note)
            bar.advance(task, count)

        yield advance
