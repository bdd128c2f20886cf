"""A model for lmms-eval that answers under any mitigation.

lmms-eval (0.7.3) finds it by the entry point ``groundscope`` of its group ``lmms_eval.models`` where both packages are
installed::

    python -m lmms_eval --model groundscope --model_args path=FOLDER,mitigation=vcd --tasks pope

``model_args`` are the parameters of the class: ``path``, ``mitigation`` (`mitigation.named_mitigation`: a method with its
parameters, or the file of a steering vector), ``dtype``, ``batch_size``, ``max_new_tokens``, ``trust_remote_code``. In Python
an instance takes a loaded model and any `Mitigation`:
``GroundscopeModel(model=gs.load_lvlm(…), mitigation=vector)``.

Differences from the model classes of lmms-eval: text is generated greedily whatever ``temperature`` a task has, unless it is
above 0; beams are refused. Scores of candidates are mean losses per token, as theirs: lmms-eval takes the smallest.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from concepts.image_files import BytesImage
from concepts.image_source import NoImage
from concepts.schema import Example
from groundscope.core.errors import ConfigError
from groundscope.core.progress import display
from mitigation.named import named_mitigation

if TYPE_CHECKING:
    from concepts.image_source import ImageSource
    from lvlm.model import Lvlm
    from mitigation.protocol import Mitigation

NAME = "groundscope"
_CLASS = "GroundscopeModel"
_NEW_TOKENS = 1024
"""Largest number of generated tokens where a task states none, as in lmms-eval's model classes."""


def manifest() -> Any:
    """Return the entry of lmms-eval's registry (``lmms_eval.models.registry_v2.ModelManifest``).

    Examples
    --------
    >>> import importlib.util
    >>> from mitigation.lmms_eval_model import NAME, manifest
    >>> manifest().model_id if importlib.util.find_spec("lmms_eval") else NAME
    'groundscope'
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.{_CLASS}")


def __getattr__(name: str) -> Any:
    """Make the class at its first use, because it derives from a class of lmms-eval."""
    if name == _CLASS:
        return _model_class()
    msg = f"module '{__name__}' has no attribute '{name}'"
    raise AttributeError(msg)


@dataclass(frozen=True)
class Request:
    """One request of lmms-eval: the text and images of a question, and how it is answered.

    Examples
    --------
    >>> from mitigation.lmms_eval_model import Request
    >>> Request("What is this?", (), {"max_new_tokens": 4}).example(0).images
    ()
    """

    text: str
    images: tuple[Any, ...]
    """Images of Pillow."""
    options: Mapping[str, Any]
    """Generation options of the task."""
    continuation: str = ""
    """The text whose loss is asked for."""

    def example(self, number: int) -> Example:
        """Return the request as an open question."""
        sources = tuple(_source(image) for image in self.images)
        return Example(
            f"request {number}", sources[0] if sources else NoImage(), self.text, "", (), None, "request", "neutral",
            f"request {number}", further_images=sources[1:],
        )  # fmt: skip


def generate_texts(
    model: Lvlm,
    requests: Sequence[Request],
    context: AbstractContextManager[None],
    *,
    batch_size: int = 1,
    max_new_tokens: int | None = None,
) -> list[str]:
    """Return the texts that a model writes to requests, in their order; stop sequences of the tasks end them.

    Raises
    ------
    ConfigError
        For beams.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> import groundscope as gs
    >>> from mitigation.lmms_eval_model import Request, generate_texts
    >>> request = Request("What color is the apple?", (gs.scenes.dataset(10)[0].image.load(),), {"max_new_tokens": 1})
    >>> len(generate_texts(gs.load_lvlm("tiny"), [request], nullcontext()))
    1
    """
    texts: list[str] = [""] * len(requests)
    with context, display() as bar:
        task = bar.add_task("answering", total=len(requests))
        for (tokens, sampling), members in _by_options(requests, max_new_tokens):
            examples = [requests[i].example(i) for i in members]
            for batch in model.batches(examples, batch_size, in_order=False):
                written = model.generate_batch(batch, tokens, sampling=sampling)
                for index, text in zip(batch.index, written, strict=True):
                    texts[members[index]] = _stopped(text, requests[members[index]].options.get("until"))
                bar.advance(task, len(batch.index))
    return texts


def continuation_losses(
    model: Lvlm, requests: Sequence[Request], context: AbstractContextManager[None]
) -> list[tuple[float, bool]]:
    """Return the mean loss per token of each request's continuation, and whether greedy decoding writes it.

    Raises
    ------
    ConfigError
        Under a decoding method, which chooses tokens and gives texts no probability.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> import groundscope as gs
    >>> from mitigation.lmms_eval_model import Request, continuation_losses
    >>> request = Request("Is it red?", (gs.scenes.dataset(10)[0].image.load(),), {}, "yes")
    >>> continuation_losses(gs.load_lvlm("tiny"), [request], nullcontext())[0][0] > 0
    True
    """
    from lvlm.answer_keys import answer_tokens
    from lvlm.answer_scores import answer_log_probabilities

    results: list[tuple[float, bool]] = []
    with context:
        for number, request in enumerate(requests):
            example = request.example(number)
            tokens = answer_tokens(model, example, request.continuation.strip())
            batch = next(model.batches([example], 1))
            log_p = float(answer_log_probabilities(model, batch, [tokens])[0])
            written = model.generate_batch(batch, len(tokens))[0]
            results.append((-log_p / max(len(tokens), 1), written.strip() == request.continuation.strip()))
    return results


def _by_options(requests: Sequence[Request], longest: int | None) -> Iterator[tuple[tuple[int, Any], list[int]]]:
    """Yield the requests that are generated with the same number of tokens and the same sampling."""
    from lvlm.sampling import Sampling

    groups: dict[tuple[int, Any], list[int]] = {}
    for i, request in enumerate(requests):
        options = request.options
        if int(options.get("num_beams") or 1) > 1:
            msg = f"num_beams={options['num_beams']}: beams are a mitigation here; set num_beams=1, and mitigation=beam"
            raise ConfigError(msg)
        temperature = float(options.get("temperature") or 0.0)
        sampling = Sampling(temperature, float(options.get("top_p") or 1.0)) if temperature > 0 else None
        groups.setdefault((longest or int(options.get("max_new_tokens") or _NEW_TOKENS), sampling), []).append(i)
    yield from groups.items()


def _stopped(text: str, until: Any) -> str:
    """Return a text up to the first of its stop sequences."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.split(stop)[0]
    return text


def _source(image: Any) -> ImageSource:
    """Return an image of Pillow as an image source."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        msg = f"groundscope's models see images; this task has {type(image).__name__}"
        raise ConfigError(msg)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    return BytesImage(data, hashlib.sha256(data).hexdigest()[:16])


@functools.cache
def _model_class() -> type:
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

    class GroundscopeModel(lmms):
        """A model of groundscope, alone or under a mitigation."""

        def __init__(
            self,
            path: str = "tiny",
            mitigation: str | Mitigation = "",
            *,
            model: Lvlm | None = None,
            dtype: str = "auto",
            device: str | None = None,
            batch_size: int | str = 1,
            max_new_tokens: int | None = None,
            trust_remote_code: bool = False,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            from lvlm import load_lvlm

            place = device or "cpu"
            self.lvlm = model or load_lvlm(path, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
            named = isinstance(mitigation, str)
            self.mitigation = (named_mitigation(mitigation, self.lvlm) if mitigation else None) if named else mitigation
            self.batch_size = int(batch_size or 1)
            self.max_new_tokens = max_new_tokens

        def context(self) -> AbstractContextManager[None]:
            """Return the context under which every request is answered."""
            return nullcontext() if self.mitigation is None else self.mitigation.applied(self.lvlm)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Return the text that answers each request."""
            read = [self._request(r.args[0], r.args[1], *r.args[2:6]) for r in requests]
            return generate_texts(
                self.lvlm, read, self.context(), batch_size=self.batch_size, max_new_tokens=self.max_new_tokens
            )

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Return the mean loss per token of each continuation, as the models of lmms-eval do."""
            read = [self._request(r.args[0], {}, *r.args[2:6], continuation=r.args[1]) for r in requests]
            return continuation_losses(self.lvlm, read, self.context())

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Refuse tasks of several rounds."""
            msg = f"{len(requests)} requests of several rounds: groundscope answers tasks of one round"
            raise NotImplementedError(msg)

        def _request(
            self, text: str, options: Mapping[str, Any], to_visual: Any, number: Any, task: str, split: str,
            continuation: Any = "",
        ) -> Request:  # fmt: skip
            doc = self.task_dict[task][split][number]
            images = [image for image in to_visual(doc) or () if image is not None]
            words = continuation if isinstance(continuation, str) else str(continuation(doc))
            return Request(text.replace("<image>", "").strip(), tuple(images), dict(options), words)

    GroundscopeModel.__module__ = __name__
    return GroundscopeModel
