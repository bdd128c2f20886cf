"""From a model and a dataset to a store: nnsight reads the tensors, what is selected of them goes to disk.

The model runs as it is: nnsight's wrapper stands beside it and hands out tensors while they are computed. Selected tokens
are taken where the tensor lies, so that only they leave the device. Values are those that a module returns; a forward
hook that somebody put on the very module that is read acts after it, and shows from the next module on.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nnsight import NNsight
from torch import Tensor

from activation_store.format.ragged import Ragged
from activation_store.format.schema import INDEX, TENSORS, Key, shard_numbers
from activation_store.reading.store import ActivationStore
from activation_store.tracing.continuation import Continued, GoesOn, goes_on_with, with_answers, with_generated
from activation_store.tracing.example_table import check_answers, has_answers, row, spans
from activation_store.tracing.inputs import check_images, encode_first, progress_bar, unreadable_images
from activation_store.tracing.plan import (
    Plan,
    Read,
    by_example,
    chunk_batches,
    make_plan,
    of_layers,
    offsets_of,
    reducer,
)
from activation_store.tracing.provenance import check_known, describe, unembedding
from activation_store.writing.writer import StoreWriter
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError, SiteError
from groundscope.core.files import Lock, explained
from lvlm.access.eager_attention import say_eager
from lvlm.access.places import Place, first_name
from lvlm.access.weights import device_of
from lvlm.model import Batch, Lvlm
from lvlm.sites import Site

# nnsight's tracing is not thread-safe.
_FORWARD = threading.Lock()


def trace(
    model: Lvlm,
    data: ConceptDataset,
    sites: Sequence[str],
    tokens: Sequence[str],
    out: str | Path,
    *,
    batch_size: int = 32,
    dtype: str = "float32",
    shard_size: int = 512,
    answers: bool = True,
    generate: int = 0,
    force: bool = False,
    progress: bool = True,
    worker: int = 0,
    workers: int = 1,
    on_error: Literal["raise", "skip"] = "raise",
) -> ActivationStore:
    """Run a model over a dataset and keep what was asked for of its inside.

    A store that is there already is continued where its sealed shards end, with the same bytes as if it had been written
    at once; one that is finished is opened without a forward over the data. Besides the activations, each example's
    row holds what the model itself would answer (columns `model_answer`, `margin`, `correct`), from the same forward, the
    digest of its picture (`image`), its objects' boxes (`boxes`, `box_ids`, `box_nouns`) and where in the decoder its
    tokens are by role (`span:image`, `span:question`, …), all as `activation_store.format.schema` says.

    Parameters
    ----------
    model
        The model under study.
    data
        What it is shown; rows of the store come in this order.
    sites
        Components of the decoder (``resid_post``, ``z``), of its cross-attention (``cross.z``), of a named stack
        (``vision.resid_post``), ``projector.out``, or single layers (``decoder.L3.z``). ``pattern`` keeps the weights of
        all heads from a token to all others, for which all examples must be of one length, and computes all attention
        step by step: a forward of another implementation, whose last bits differ, which is said through `logging`.
    tokens
        Token selections: ``last``, ``image:mean``, ``object:mean``, …; those that a stack does not have are left out
        for that stack. ``image:all``, ``question:all`` and the like keep every token: as many vectors an example as it
        has tokens, and fewer examples in memory at a time. ``generated:0``, ``generated:mean`` read the model's own
        answer as it reads it itself, token by token, ``answer:0``, ``answer:mean`` the true answer put in its place.
    out
        Folder of the store.
    batch_size
        Examples in a forward, at most; only examples of equal token length share one, nothing is padded.
    dtype
        How values are stored: ``float32``, ``float16`` or ``bfloat16``.
    shard_size
        Examples in a file of the store.
    answers
        Record the model's own answers. Without them the forward ends after the last site that is asked for.
    generate
        Let the model answer freely, at most so many tokens, before it is read; needed for ``generated:…``, and kept as
        the column ``generated``. Steps after the end of an answer are rows of NaN.
    force
        Throw away a store that is there and start anew.
    progress
        Show a progress bar where the output is a terminal.
    worker, workers
        Trace one of several parts of the data, each in a process of its own, into the same folder; the last to finish
        makes the store whole. Parts are runs of neighbouring examples, cut between chunks of batches: rows and values are
        those of a trace in one piece. With fewer chunks than workers some parts are empty.
    on_error
        What an image that cannot be read does: ``raise`` a `DataError` before the first forward, or ``skip`` its examples.
        Those are named with the reason in the store's provenance under ``skipped``, and counted in a warning through
        `logging`; to look for them, all images are read first, by each worker. Where there are any, the store is one of the
        remaining examples: after an image was repaired, trace into another folder.

    Returns
    -------
    ActivationStore
        What is there: with several workers, the rows that they have sealed so far. Arrays float ``[N, L, D]`` by
        stack, component and token selection; z with its heads side by side. An example whose selection is empty has a
        row of NaN. Selections that keep every token are read by ``ragged``: ``[T, D]`` for an example, no token where
        the selection is empty. ``tensor("final_norm.weight")`` [D] and ``tensor("unembedding.weight")`` [V, D] (and
        their biases where there are) come with the decoder's sites.

    Raises
    ------
    SiteError
        Where the model lacks a site or a token selection.
    DataError
        Where there is no example, an image (with ``skip``: every image) cannot be read, or answers cannot be told apart
        by their first token.
    ModelError
        Where the logits that an answer is read from are not finite.
    ConfigError
        For a batch size below 1, an unknown `on_error`, or where both the model's own and the true answer are to be
        read in one trace.
    StoreError
        Where the folder holds a store of something else (names the field; a steering vector or other intervention that is
        applied now and was not then is one), a hook of unknown effect acts on the model and rows are to join others, or it
        cannot be written.
    """
    if batch_size < 1:
        msg = f"batch_size={batch_size}: at least 1 example goes into a forward"
        raise ConfigError(msg)
    if not 0 <= worker < workers or (force and workers > 1):
        msg = f"worker={worker} of workers={workers}, force={force}: worker is 0 to {workers - 1}; force is for one worker"
        raise ConfigError(msg)
    if on_error not in ("raise", "skip"):
        msg = f"on_error='{on_error}': choose 'raise' or 'skip'"
        raise ConfigError(msg)
    if not len(data):
        msg = f"dataset '{data.name}' has no examples: nothing to trace"
        raise DataError(msg)
    skipped = unreadable_images(data.examples, progress=progress) if on_error == "skip" else {}
    readable = [e for e in data.examples if e.id not in skipped]
    if skipped:
        _say_skipped(skipped, data)
    if answers:
        check_answers(model, data)
    goes_on = goes_on_with(tokens, generate)
    with _FORWARD:
        first = encode_first(model, readable[0])
        if goes_on:  # where the answer will be is not known yet, only that there will be one
            first = replace(first, tokens=replace(first.tokens, generated=()))
        plan = make_plan(model, first, sites, tokens, dtype)
    provenance = describe(model, data, plan, batch_size, answers=answers, generate=generate)
    if skipped:
        provenance["skipped"] = skipped
    folder = Path(out)
    if force:
        _clear(folder)
    check_known(model, folder, workers)
    run = Tracer.begin(model, data, plan, batch_size, answers=answers, goes_on=goes_on, steps=generate)
    size = chunk_batches(plan, first.tokens, batch_size) * batch_size
    chunks = -(-len(readable) // size)
    first_row, stop_row = (
        min(len(readable), worker_at * chunks // workers * size) for worker_at in (worker, worker + 1)
    )
    part = readable[first_row:stop_row]
    extra = unembedding(model, plan)
    with StoreWriter(
        folder, plan.schema, provenance, worker, shard_size=shard_size, workers=workers, extra=extra
    ) as writer:
        done = frozenset(writer.written)
        missing = [e for e in part if e.id not in done]
        pictures = check_images(missing, progress=progress)
        with progress_bar("tracing", len(part), len(part) - len(missing), progress=progress) as advance:
            if missing and any(read.site.component == "pattern" for read in plan.reads):
                say_eager(model)
            if missing and plan.skipped:
                advance(0, "; ".join(plan.skipped))
            for start in range(0, len(part), size):
                # The same chunks and batches whatever is there already: values depend on who shares a forward, in the
                # last bits. The writer leaves out the rows that it has.
                chunk = part[start : start + size]
                if any(e.id not in done for e in chunk):
                    arrays, table = run.chunk(chunk, lambda some: advance(sum(e.id not in done for e in some), ""))
                    writer.append(arrays, {**table, "image": [pictures.get(e.id, "") for e in chunk]})
    return ActivationStore(folder)


@dataclass(frozen=True)
class Tracer:
    """A model made ready to be read."""

    model: Lvlm
    wrapper: Any
    """nnsight's view of the model."""
    reads: tuple[tuple[Any, tuple[Read, ...]], ...]
    """nnsight's view of a module and what is read there (one side of it), in the order of the forward."""
    plan: Plan
    batch_size: int
    concepts: tuple[str, ...]
    answers: bool
    goes_on: GoesOn = ""
    """What follows the prompt: the model's own answer (``generated``), the true one (``answer``), or nothing."""
    steps: int = 0
    """Most tokens of the model's own answer."""

    @classmethod
    def begin(
        cls,
        model: Lvlm,
        data: ConceptDataset,
        plan: Plan,
        batch_size: int,
        *,
        answers: bool,
        goes_on: GoesOn = "",
        steps: int = 0,
    ) -> Tracer:
        """Put nnsight's wrapper beside a model; its modules stay the same objects, with the same results."""
        with warnings.catch_warnings():
            # Said of a module that has a child called "output" or the like; we reach modules by identity, not by name.
            warnings.filterwarnings("ignore", message=".* has a submodule named .*, which", category=UserWarning)
            wrapper = _Beside(model.hf)
        views = {id(envoy._module): envoy for envoy in wrapper.modules()}
        # A module's tensor is taken once, whatever is read from it: queries, keys and values of one projection, say.
        at = [(views[id(p.module)], tuple(some)) for p, some in _same_tensor(plan.reads)]
        reads = tuple(at)
        concepts = tuple(sorted({concept for example in data for concept in example.labels}))
        return cls(model, wrapper, reads, plan, batch_size, concepts, answers, goes_on, steps)

    def chunk(
        self, examples: Sequence[Example], seen: Callable[[Sequence[Example]], None]
    ) -> tuple[dict[Key, np.ndarray | Ragged], dict[str, list[Any]]]:
        """Return the arrays ``[n, L, D]`` (or ragged) and table columns of some examples, in their order.

        After each batch `seen` is called with the examples in it.
        """
        n = len(examples)
        infos = self.plan.schema.arrays
        arrays = {a.key: np.empty((n, a.n_layers, a.width), np.float32) for a in infos if not a.ragged}
        parts: dict[Key, list[np.ndarray]] = {a.key: [np.empty(0)] * n for a in infos if a.ragged}
        order: list[int] = []
        columns: dict[str, list[Any]] = {}
        for batch in self.model.batches(examples, self.batch_size):
            values, table = self.batch(batch)
            for key, value in values.items():
                if isinstance(value, Ragged):
                    for i, one in zip(batch.index, value, strict=True):
                        parts[key][i] = one
                else:
                    arrays[key][list(batch.index)] = value
            for name, column in table.items():
                columns.setdefault(name, []).extend(column)
            order.extend(batch.index)
            seen([e.example for e in batch.encodings])
        back = np.argsort(order)
        ragged = {key: Ragged.of(parts.pop(key)) for key in list(parts)}
        return {**arrays, **ragged}, {name: [column[i] for i in back] for name, column in columns.items()}

    def batch(self, batch: Batch) -> tuple[dict[Key, np.ndarray | Ragged], dict[str, list[Any]]]:
        """Run one batch; return its arrays ``[B, L, D]`` (or ragged) and table columns."""
        on = None
        if self.goes_on:
            with _FORWARD:
                on = with_generated(self.model, batch, self.steps) if self.steps else with_answers(self.model, batch)
        with self.model.reading_answers(batch.encodings[0].tokens.length if on else None):
            values, logits = self.forward(batch, on)
        maps = on.tokens if on else tuple(e.tokens for e in batch.encodings)
        arrays: dict[Key, np.ndarray | Ragged] = {key: value.float().cpu().numpy() for key, value in values.items()}
        for a in self.plan.schema.arrays:
            if a.ragged:
                arrays[a.key] = Ragged(np.asarray(arrays[a.key]), offsets_of(maps, a))
        last = [None] * len(batch.encodings) if logits is None else logits.float().cpu().unbind()  # B x [V]
        roles = [role for role in self.plan.roles if role not in {"generated", "answer"} or role == self.goes_on]
        rows = [
            {**row(self.model, encoding, one, self.concepts), **spans(tokens, roles)}
            for encoding, one, tokens in zip(batch.encodings, last, maps, strict=True)
        ]
        if on and self.steps:
            rows = [{**one, "generated": text} for one, text in zip(rows, on.texts, strict=True)]
        return arrays, {name: [one[name] for one in rows] for name in rows[0]}

    @torch.no_grad()
    def forward(self, batch: Batch, on: Continued | None = None) -> tuple[dict[Key, Tensor], Tensor | None]:
        """Run one batch; return what is kept ``[B, L, D]`` on its device, and the last logits ``[B, V]`` if wanted.

        Of ragged arrays float32 ``[S, L, D]`` is kept on the CPU, the tokens of all rows one after the other.
        With `on` the rows go on after their prompts; the logits are still those after the prompt's last token.
        """
        maps = on.tokens if on else tuple(e.tokens for e in batch.encodings)
        reducers = {
            stack: [(str(s), reducer([m.positions(s, stack) for m in maps], s, self.model.device)) for s in selections]
            for stack, selections in self.plan.selections.items()
        }
        asked = self.answers and any(has_answers(e.example) for e in batch.encodings)
        kept: dict[Key, dict[int, Tensor]] = {a.key: {} for a in self.plan.schema.arrays}
        widths = {a.key: a.width for a in self.plan.schema.arrays}
        logits: list[Tensor] = []
        extra = on.extra if on else 0

        def keep(reads: tuple[Read, ...], raw: Any) -> None:
            for read in reads:
                site = read.site
                x = by_example(read.place.value(raw, calls[site]), len(maps), site)
                component = f"cross.{site.component}" if site.cross else site.component
                for selection, reduce in reducers[site.stack]:
                    key = (site.stack, component, selection)
                    _check_width(site, x, widths[key], batch)
                    kept[key][site.layer] = reduce(x)

        inputs = on.inputs if on else batch.inputs
        with ExitStack() as stack:
            calls = {}
            for _, reads in self.reads:
                for read in reads:
                    calls[read.site], handles = read.place.call()
                    stack.callback(handles.remove)
            if any(read.site.component == "pattern" for read in self.plan.reads):
                stack.enter_context(self.model.eager())
            stack.enter_context(_FORWARD)
            less = stack.enter_context(self.model.last_logits(extra + 1))
            # The same call as `Lvlm.logits`. nnsight runs this body in step with the forward: each read waits for its
            # tensor. What is kept lives in containers made outside, as names bound inside do not come out.
            with self.wrapper.trace(**inputs, use_cache=False, **less) as tracer:
                for view, reads in self.reads:
                    keep(reads, _raw(view, reads[0].place.side))
                if asked:
                    logits.append(self.wrapper.output.logits[:, -1 - extra])
                else:
                    tracer.stop()
        stacked = {a.key: of_layers(kept[a.key], a) for a in self.plan.schema.arrays}
        return stacked, logits[0] if asked else None


def _say_skipped(skipped: Mapping[str, str], data: ConceptDataset) -> None:
    name, reason = next(iter(skipped.items()))
    if len(skipped) == len(data):
        msg = f"dataset '{data.name}': no image can be read; the first is that of example '{name}': {reason}"
        raise DataError(msg)
    more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    logging.getLogger(__name__).warning(
        "%d of %d examples are left out, as their images cannot be read: '%s' (%s)%s; all are named in the store's "
        "provenance under 'skipped'",
        len(skipped),
        len(data),
        name,
        reason,
        more,
    )


class _Beside(NNsight):
    """nnsight's view of a model; inputs go where the model takes them, even where its first parameter is kept elsewhere."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return device_of(self._module)


def _raw(view: Any, side: str) -> Any:
    """Return a module's input or output inside a trace, as `lvlm.access.places.Place` takes it."""
    if side == "input":
        args, kwargs = view.inputs
        return args[0] if args else kwargs[first_name(kwargs)]
    return view.output


def _same_tensor(reads: Sequence[Read]) -> list[tuple[Place, list[Read]]]:
    """Return reads in their order, those of one side of one module together."""
    groups: list[tuple[Place, list[Read]]] = []
    for read in reads:
        place = read.place
        group = next((some for at, some in groups if at.module is place.module and at.side == place.side), None)
        if group is None:
            groups.append((place, [read]))
        else:
            group.append(read)
    return groups


def _check_width(site: Site, x: Tensor, width: int, batch: Batch) -> None:
    if x.shape[-1] != width:
        msg = (
            f"site '{site}' has {x.shape[-1]} values for example '{batch.encodings[0].example.id}' and {width} for the "
            "first: a pattern can be kept only of examples of one length; trace those of one length"
        )
        raise SiteError(msg)


def _clear(folder: Path) -> None:
    """Remove the files of a store from a folder, and no others."""
    if not folder.is_dir():
        return
    with explained(lambda reason: f"{folder}: the store that is there cannot be removed: {reason}"):
        held = f"{folder}: the store is being written by another process; wait for its end"
        lock = Lock(folder / ".worker-0.lock", held)
        try:
            # Manifests come first: without them what is left, should this be interrupted, does not look finished.
            for path in sorted(folder.iterdir(), key=lambda p: (not p.name.startswith("manifest"), p.name)):
                ours = path.name in {TENSORS, INDEX} or shard_numbers(path.name) or path.suffix in {".part", ".tmp"}
                ours = ours or (path.name.startswith(".sealed-") and path.suffix == ".jsonl")
                if ours or (path.name.startswith("manifest") and path.suffix == ".json"):
                    path.unlink()
        finally:
            lock.release()
