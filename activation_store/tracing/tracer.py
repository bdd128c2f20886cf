"""Trace a model over a dataset into a store: nnsight reads the tensors, and the selected tokens are written to disk.

The model is not modified: nnsight wraps it and yields tensors while they are computed. Tokens are selected on the device
of the tensor, so that only the selection is moved. The stored values are the outputs of modules; a forward hook on the
module itself acts afterwards and affects only later modules.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nnsight import NNsight
from torch import Tensor

from activation_store.format.ragged import Ragged
from activation_store.format.schema import INDEX, TENSORS, ArrayInfo, Key, shard_numbers
from activation_store.reading.store import ActivationStore
from activation_store.row_input import RowInput
from activation_store.tracing.continuation import (
    Continuation,
    ContinuedBatch,
    append_answers,
    append_generated,
    choose_continuation,
    longest_answer,
)
from activation_store.tracing.example_table import build_row, build_spans, check_answers, has_answers
from activation_store.tracing.inputs import check_images, encode_first, unreadable_images
from activation_store.tracing.mention_tokens import MentionTokens, build_mentions, check_mentions
from activation_store.tracing.module_values import check_width, raw_value
from activation_store.tracing.plan import (
    Plan,
    Read,
    Reduce,
    chunk_batches,
    make_plan,
    make_reducer,
    split_by_example,
    stack_layers,
    token_offsets,
)
from activation_store.tracing.provenance import check_hooks, describe, read_unembedding
from activation_store.tracing.shared_forward import SharedForward, shares_prefixes, trace_batches
from activation_store.tracing.single_modality import select_modality
from activation_store.writing.writer import StoreWriter
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError, StoreError
from groundscope.core.files import explained
from groundscope.core.locks import acquire
from groundscope.core.progress import step_bar
from groundscope.core.text import nearest
from lvlm.access.eager_attention import warn_of_eager
from lvlm.access.hook_point import HookPoint
from lvlm.access.weights import device_of
from lvlm.answer_keys import check_prefixes
from lvlm.decoding.prefix_run import PrefixBatch
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
    heads: Sequence[int] | None = None,
    reduce: Reduce | None = None,
    shard_size: int = 512,
    input: RowInput = "both",
    unembedding: bool = True,
    answers: bool = True,
    generate: int = 0,
    worker: int = 0,
    workers: int = 1,
    on_error: Literal["raise", "skip"] = "raise",
    force: bool = False,
    progress: bool | None = None,
) -> ActivationStore:
    """Run a model over a dataset and store the requested activations.

    An existing store is continued after its sealed shards, with the same bytes as an uninterrupted run; a finished store is
    opened without a forward pass over the data. Besides the activations, each example's table row holds the model's own
    answer (columns `model_answer`, `margin`, `correct`) from the same forward pass, its prefix if any example has one
    (`prefix`), the digest of its image (`image`), the
    boxes of its objects (`boxes`, `box_ids`, `box_nouns`) and the decoder positions of its tokens by role (`span:image`,
    `span:question`, …), as defined in `activation_store.format.schema`.

    Parameters
    ----------
    model
        The model under study.
    data
        The examples; rows of the store are in this order.
    sites
        Components of the decoder (``resid_post``, ``z``), of its cross-attention (``cross.z``), of a named stack
        (``vision.resid_post``), ``projector.out``, or single layers (``decoder.L3.z``). ``pattern`` stores the attention
        weights of all heads from a token to all others; all examples must then have equal length, and attention uses the
        eager implementation, whose results differ in the last bits; `logging` reports this.
    tokens
        Token selections: ``last``, ``image:mean``, ``object:mean``, …; selections that do not apply to a stack are skipped
        for it. ``image:all``, ``question:all`` and other ``:all`` selections store every token: one vector per token, with
        fewer examples in memory at a time. ``generated:0``, ``generated:mean`` read at the tokens of the model's own answer,
        ``answer:0``, ``answer:mean`` at those of the true answer, appended to the prompt. ``mention:before``,
        ``mention:first`` and ``mention:last`` have a row for each object that a written text mentions
        (`concepts.with_mentions`); `ActivationStore.mentions` returns these rows with their labels.
    out
        Folder of the store.
    batch_size
        Maximum number of examples per forward pass. Examples of one chunk that are about one image share the run of the image and
        of all tokens before the first that differs, where that is exact (`lvlm.prefix_sharing.unshared_because`); otherwise only
        examples of equal token length share a forward pass, without padding.
    dtype
        Storage dtype: ``float32``, ``float16`` or ``bfloat16``.
    heads
        Numbers of the heads of the decoder of which ``z``, ``q`` and ``pattern`` are stored, in each traced layer; all by
        default. Reading uses the model's numbers: ``store.read("decoder.L3.z", "last", head=7)``.
    reduce
        Reductions by token selection: a few values of each token instead of its activations, at the sites where they apply,
        such as ``{"image:all": [Margin(directions), LensRank(["dog"])]}`` (`activation_store.Reduction`). They are read by
        ``store.ragged("decoder.L3.resid_post", "image:all", reduction="rank")``, one column for each of its values. A selection
        that is also in `tokens` is stored both ways.
    shard_size
        Examples per file of the store.
    input
        What the rows see. ``both``: the whole prompt. ``text``: the prompt without its image, as for a question without one.
        ``image``: the prompt of an empty question: image tokens, their markers and the words of the template, none of the
        example (`activation_store.tracing.single_modality`); no answers are recorded then. The table keeps the questions and
        boxes of the examples. A store says what its rows have seen (`ActivationStore.input`), and is not continued or merged with
        another input.
    unembedding
        Store the final norm and the unembedding with decoder sites, in the dtype of the model's weights, for
        `probes.logit_lens`.
    answers
        Record the model's own answers. Otherwise the forward pass stops after the last requested site.
    generate
        Maximum number of tokens of a generated answer, decoded before the activations are read; required for
        ``generated:…``, and stored in the column ``generated``. Steps after the end of an answer are rows of NaN.
    worker, workers
        Trace one of several parts of the data, each in a separate process, into the same folder; the last worker to finish
        completes the store. Parts are contiguous examples, divided between chunks of batches: rows and values equal those
        of a single process. With fewer chunks than workers some parts are empty.
    on_error
        For an image that cannot be read: ``raise`` a `DataError` before the first forward pass, or ``skip`` its examples.
        Skipped examples are listed with the reason in the store's provenance under ``skipped``, and counted in a warning
        through `logging`; every worker reads all images first to find them. The store then holds the remaining examples:
        after an image is repaired, trace into another folder.
    force
        Delete an existing store and start from the beginning.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Returns
    -------
    ActivationStore
        The store; with several workers, the rows sealed so far. Arrays float ``[N, L, D]`` by stack, component and token
        selection; z with its heads concatenated. An example with an empty selection has a row of NaN. ``:all`` selections
        are read by ``ragged``: ``[T, D]`` for an example, no token if the selection is empty.
        ``tensor("final_norm.weight")`` [D] and ``tensor("unembedding.weight")`` [V, D] (and their biases, if any) are
        stored with decoder sites if `unembedding` is true; they are float32 when read.

    Raises
    ------
    SiteError
        If the model does not have a site, a token selection or a head, or heads are requested of sites without heads, or
        a reduction applies to none of the sites.
    DataError
        If there is no example, an image (with ``skip``: every image) cannot be read, answers have the same first token, or
        a prefix is not plain text that the tokenizer knows, or no example has mentions and their tokens are requested.
    ModelError
        If the logits of an answer are not finite, or the model does not run on text alone.
    ConfigError
        If the batch size is below 1, `input` or `on_error` is unknown, or one trace requests both the model's own and the true
        answer.
    StoreError
        If the folder holds a store of another model, dataset or plan (the message names the field; a steering vector or
        another intervention that is active now but was not then also counts), a hook of unknown effect acts on the model
        while rows would be added to others, or the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> data = gs.scenes.dataset(n_images=20, splits=["neutral"])[:4]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = gs.trace(model, data, sites=["resid_post", "vision.L1.z"], tokens=["last", "image:mean"], out=folder)
    ...     [(array.name, array.n_layers, array.width) for array in store.arrays]
    [('decoder.resid_post/image:mean', 6, 192), ('decoder.resid_post/last', 6, 192), ('vision.z/image:mean', 1, 128)]
    """
    if batch_size < 1:
        msg = f"batch_size={batch_size} must be at least 1"
        raise ConfigError(msg)
    if not 0 <= worker < workers or (force and workers > 1):
        msg = f"worker={worker}, workers={workers}, force={force}: worker must be 0 to {workers - 1}; force=True needs workers=1"
        raise ConfigError(msg)
    if on_error not in ("raise", "skip"):
        msg = f"unknown on_error '{on_error}'; choose from raise, skip{nearest(str(on_error), ('raise', 'skip'))}"
        raise ConfigError(msg)
    if not len(data):
        msg = f"dataset '{data.name}' has no examples to trace; give at least one"
        raise DataError(msg)
    selected = [*([tokens] if isinstance(tokens, str) else tokens), *(reduce or {})]
    whole, data = data, select_modality(model, data, input, sites, selected, generate)
    answers = answers and input != "image"
    skipped = unreadable_images(data.examples, progress=progress) if on_error == "skip" else {}
    readable = [e for e in data.examples if e.id not in skipped]
    if skipped:
        _warn_about_skipped(skipped, data)
    if answers:
        check_answers(model, data)
    continuation = choose_continuation(selected, generate)
    check_prefixes(model, readable)
    check_mentions(selected, data)
    _check_no_image(model, readable)
    with _FORWARD:
        first = encode_first(model, next((e for e in readable if e.images), readable[0]))
        if continuation:  # the plan needs only the fact that an answer follows, not its positions
            first = replace(first, tokens=replace(first.tokens, generated=()))
        plan = make_plan(model, first, sites, tokens, dtype, heads, reduce)
    with _FORWARD:
        shared = shares_prefixes(model, readable, plan)
    provenance = describe(model, whole, plan, batch_size, answers=answers, generate=generate, shared=shared, seen=input)
    if skipped:
        provenance["skipped"] = skipped
    folder = Path(out)
    if force:
        _clear(folder)
    check_hooks(model, folder, workers)
    options: dict[str, Any] = {"continuation": continuation, "steps": generate, "shared": shared}
    run = Tracer.begin(model, data, plan, batch_size, answers=answers, **options)
    size = chunk_batches(plan, first.tokens, batch_size) * batch_size
    chunks = -(-len(readable) // size)
    first_row, stop_row = (
        min(len(readable), worker_at * chunks // workers * size) for worker_at in (worker, worker + 1)
    )
    part = readable[first_row:stop_row]
    extra = read_unembedding(model, plan) if unembedding else None
    questions = {e.id: e.question for e in whole}
    with StoreWriter(
        folder, plan.schema, provenance, worker=worker, workers=workers, shard_size=shard_size, extra=extra
    ) as writer:
        done = frozenset(writer.sealed_ids)
        missing = [e for e in part if e.id not in done]
        pictures = check_images(missing, progress=progress)
        with step_bar("tracing", len(part), done=len(part) - len(missing), show=progress) as advance:
            if missing and any(read.site.component == "pattern" for read in plan.reads):
                warn_of_eager(model)
            if missing and plan.skipped:
                advance(0, "; ".join(plan.skipped))
            for start in range(0, len(part), size):
                # Always the same chunks and batches: the last bits of values depend on which examples share a forward
                # pass. The writer skips the rows that it already has.
                chunk = part[start : start + size]
                if any(e.id not in done for e in chunk):
                    arrays, table = run.chunk(chunk, lambda batch: advance(sum(e.id not in done for e in batch)))
                    columns = {"image": [pictures.get(e.id, "") for e in chunk]}
                    if input == "image":  # the table keeps the questions that the model did not see
                        columns["question"] = [questions[e.id] for e in chunk]
                    writer.append(arrays, {**table, **columns})
    return ActivationStore(folder)


def _check_no_image(model: Lvlm, examples: Sequence[Example]) -> None:
    """Raise `DataError` for an example without an image, where the model skips layers without one."""
    without = next((e for e in examples if not e.images), None)
    if without is not None and any(model.head_site(layer).cross for layer in range(model.n_layers)):
        msg = (
            f"example '{without.id}' has no image, and without one {model.name} skips its layers of cross-attention; leave such "
            "examples out: data.filter(lambda e: e.images)"
        )
        raise DataError(msg)


Reads = tuple[tuple[Any, tuple[Read, ...]], ...]
"""nnsight's view of a module, and the reads at one side of it."""


@dataclass(frozen=True)
class Tracer:
    """A model prepared for tracing."""

    model: Lvlm
    wrapper: Any
    """nnsight's view of the model."""
    reads: Reads
    """nnsight's view of a module, and the reads at one side of it, in the order of the forward pass."""
    plan: Plan
    batch_size: int
    concepts: tuple[str, ...]
    answers: bool
    continuation: Continuation = ""
    """What follows the prompt: the model's own answer (``generated``), the true one (``answer``), or nothing."""
    steps: int = 0
    """Maximum number of tokens of the model's own answer."""
    prefixes: bool = False
    """Whether any example has a prefix; the table then has the columns ``prefix`` and ``span:prefix``."""
    mentions: bool = False
    """Whether tokens of mentions are read; the table then has the columns ``mention:…``."""
    reduced: Mapping[tuple[Site, str], tuple[tuple[Key, Callable[[Tensor], Tensor]], ...]] = field(default_factory=dict)
    """For a site and a token selection, the arrays of its reductions and the functions that compute them."""
    shared: bool = False
    """Whether examples of a chunk that are about one image share the run of their prefix."""

    @property
    def widths(self) -> dict[Key, int]:
        """The width of the tensor from which each array is read: of all heads, also if only some are stored."""
        plain = [a for a in self.plan.schema.arrays if not a.reduction]
        return {a.key: a.width // len(a.heads) * self.model.n_heads if a.heads else a.width for a in plain}

    @classmethod
    def begin(
        cls,
        model: Lvlm,
        data: ConceptDataset,
        plan: Plan,
        batch_size: int,
        *,
        answers: bool,
        continuation: Continuation = "",
        steps: int = 0,
        shared: bool = False,
    ) -> Tracer:
        """Wrap a model with nnsight; its modules stay the same objects, with the same results."""
        with warnings.catch_warnings():
            # nnsight warns about modules with a child named "output"; here modules are located by identity, not by name.
            warnings.filterwarnings("ignore", message=".* has a submodule named .*, which", category=UserWarning)
            wrapper = _NnsightWrapper(model.hf)
        views = {id(envoy._module): envoy for envoy in wrapper.modules()}
        # A module's tensor is fetched once for all its reads: for example queries, keys and values of one projection.
        reads = tuple((views[id(p.module)], tuple(group)) for p, group in _group_by_tensor(plan.reads))
        concepts = tuple(sorted({concept for example in data for concept in example.labels}))
        prefixes = any(example.prefix for example in data)
        mentions = any(s.role == "mention" for selections in plan.selections.values() for s in selections)
        options: dict[str, Any] = {"continuation": continuation, "steps": steps, "prefixes": prefixes}
        options |= {"mentions": mentions, "reduced": _prepared(model, plan), "shared": shared}
        return cls(model, wrapper, reads, plan, batch_size, concepts, answers, **options)

    def chunk(
        self, examples: Sequence[Example], on_batch: Callable[[Sequence[Example]], None]
    ) -> tuple[dict[Key, np.ndarray | Ragged], dict[str, list[Any]]]:
        """Return the arrays ``[n, L, D]`` (or ragged) and table columns of a chunk of examples, in their order.

        After each batch `on_batch` is called with its examples.
        """
        n = len(examples)
        infos = self.plan.schema.arrays
        arrays = {a.key: np.empty((n, a.n_layers, a.width), np.float32) for a in infos if not a.ragged}
        parts: dict[Key, list[np.ndarray]] = {a.key: [np.empty(0)] * n for a in infos if a.ragged}
        order: list[int] = []
        columns: dict[str, list[Any]] = {}
        size = self.batch_size
        extra = self.steps or (longest_answer(self.model, examples) if self.continuation else 0)
        plain = self.model.batches
        batches = trace_batches(self.model, examples, size, extra) if self.shared else plain(examples, size)
        for batch in batches:
            values, table = self.batch(batch)
            for key, value in values.items():
                if isinstance(value, Ragged):
                    for i, tokens in zip(batch.index, value, strict=True):
                        parts[key][i] = tokens
                else:
                    arrays[key][list(batch.index)] = value
            for name, column in table.items():
                columns.setdefault(name, []).extend(column)
            order.extend(batch.index)
            on_batch([e.example for e in batch.encodings])
        original_order = np.argsort(order)
        ragged = {key: Ragged.of(parts.pop(key)) for key in list(parts)}
        return {**arrays, **ragged}, {name: [column[i] for i in original_order] for name, column in columns.items()}

    def batch(self, batch: Batch | PrefixBatch) -> tuple[dict[Key, np.ndarray | Ragged], dict[str, list[Any]]]:
        """Run one batch; return its arrays ``[B, L, D]`` (or ragged) and table columns."""
        on = None
        # Hooks and settings of the model are those of one batch at a time, too.
        with _FORWARD:
            if self.continuation:
                on = (
                    append_generated(self.model, batch, self.steps) if self.steps else append_answers(self.model, batch)
                )
            if isinstance(batch, PrefixBatch):
                values, logits, log_p = self.forward_shared(batch, on)
            else:
                with self.model.reading_answers(batch.encodings[0].tokens.length if on else None):
                    values, logits, log_p = self.forward(batch, on)
        maps = on.tokens if on else tuple(e.tokens for e in batch.encodings)
        arrays: dict[Key, np.ndarray | Ragged] = {key: value.float().cpu().numpy() for key, value in values.items()}
        for a in self.plan.schema.arrays:
            if a.ragged:
                arrays[a.key] = Ragged(np.asarray(arrays[a.key]), token_offsets(maps, a))
        last = [None] * len(batch.encodings) if logits is None else logits.float().cpu().unbind()  # B x [V]
        absent = {"generated", "answer"} - {self.continuation} | (set() if self.prefixes else {"prefix"})
        roles = [role for role in self.plan.roles if role not in absent]
        rows = [
            {**build_row(self.model, encoding, logit, self.concepts), **build_spans(tokens, roles)}
            for encoding, logit, tokens in zip(batch.encodings, last, maps, strict=True)
        ]
        if self.prefixes:
            rows = [{**row, "prefix": e.example.prefix} for row, e in zip(rows, batch.encodings, strict=True)]
        if self.mentions:
            rows = [
                {**row, **build_mentions(e, of_tokens)}
                for row, e, of_tokens in zip(rows, batch.encodings, log_p, strict=True)
            ]
        if on and self.steps:
            rows = [{**fields, "generated": text} for fields, text in zip(rows, on.texts, strict=True)]
        return arrays, {name: [fields[name] for fields in rows] for name in rows[0]}

    def forward_shared(
        self, batch: PrefixBatch, on: ContinuedBatch | None
    ) -> tuple[dict[Key, Tensor], Tensor | None, list[list[float]]]:
        """Run one batch of rows with shared prefixes; return what `forward` returns."""
        maps = on.tokens if on else tuple(e.tokens for e in batch.encodings)
        answered = self.answers and any(has_answers(e.example) for e in batch.encodings)
        vectors, logits = SharedForward(self, batch).run(maps, on, needs_logits=answered)
        return vectors, logits, [[] for _ in maps]

    @torch.no_grad()
    def forward(
        self, batch: Batch, on: ContinuedBatch | None = None
    ) -> tuple[dict[Key, Tensor], Tensor | None, list[list[float]]]:
        """Run one batch; return the selected vectors ``[B, L, D]`` on their device, and the last logits ``[B, V]`` or None.

        The third result is the log-probability of each token of the mentions of each row, if they are recorded. Ragged arrays
        are float32 ``[S, L, D]`` on the CPU, the concatenated tokens of all rows. With `on` the rows continue after their
        prompts; the logits are still those after the prompt's last token.
        """
        maps = on.tokens if on else tuple(e.tokens for e in batch.encodings)
        reducers = {
            stack: [
                (str(s), make_reducer([m.positions(s, stack) for m in maps], s, self.model.device)) for s in selections
            ]
            for stack, selections in self.plan.selections.items()
        }
        answered = self.answers and any(has_answers(e.example) for e in batch.encodings)
        vectors: dict[Key, dict[int, Tensor]] = {a.key: {} for a in self.plan.schema.arrays}
        columns, widths = {a.key: self.plan.columns(a) for a in self.plan.schema.arrays}, self.widths
        logits: list[Tensor] = []
        extra = on.extra if on else 0
        inputs = on.inputs if on else batch.inputs
        written = MentionTokens.of(self.model, inputs, maps) if self.mentions else None
        needs_logits = answered or written is not None

        def keep(reads: tuple[Read, ...], raw: Any) -> None:
            for read in reads:
                site = read.site
                x = split_by_example(read.place.value(raw, calls[site]), len(maps), site)
                component = f"cross.{site.component}" if site.cross else site.component
                for selection, reduce in reducers[site.stack]:
                    key = (site.stack, component, selection)
                    selected = reduce(x)
                    if key in widths:
                        check_width(site, x, widths[key], batch)
                        vectors[key][site.layer] = selected if columns[key] is None else selected[..., columns[key]]
                    for reduced_key, values in self.reduced.get((site, selection), ()):
                        vectors[reduced_key][site.layer] = values(selected)

        # Without an image the vision tower and the projector do not run.
        pictured = any(e.example.images for e in batch.encodings)
        reached = self.reads if pictured else _decoder_only(self.reads)
        with ExitStack() as stack:
            calls = {}
            for _, reads in reached:
                for read in reads:
                    calls[read.site], handles = read.place.call()
                    stack.callback(handles.remove)
            if any(read.site.component == "pattern" for read in self.plan.reads):
                stack.enter_context(self.model.eager())
            less = stack.enter_context(self.model.last_logits(max(extra + 1, written.keep if written else 0)))
            # The same call as `Lvlm.logits`. nnsight runs this body in step with the forward pass: each read waits for its
            # tensor. Results are stored in containers created outside, because names bound inside are not visible outside.
            with self.wrapper.trace(**inputs, use_cache=False, **less) as tracer:
                for view, reads in reached:
                    keep(reads, raw_value(view, reads[0].place.side))
                if needs_logits:
                    logits.append(self.wrapper.output.logits[:, -1 - extra])
                    if written is not None:
                        logits.append(written.select(self.wrapper.output.logits))
                else:
                    tracer.stop()
        stacked = {
            a.key: stack_layers(vectors[a.key], a) if vectors[a.key] else _no_vectors(a, len(maps))
            for a in self.plan.schema.arrays
        }
        log_p = written.log_probabilities(logits[1]) if written else [[] for _ in maps]
        return stacked, logits[0] if answered else None, log_p


def _warn_about_skipped(skipped: Mapping[str, str], data: ConceptDataset) -> None:
    name, reason = next(iter(skipped.items()))
    if len(skipped) == len(data):
        msg = f"dataset '{data.name}': no image can be read; the first error, for example '{name}', is: {reason}"
        raise DataError(msg)
    more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    logging.getLogger(__name__).warning(
        "%d of %d examples are skipped because their images cannot be read: '%s' (%s)%s; the store's provenance lists "
        "all of them under 'skipped'",
        len(skipped),
        len(data),
        name,
        reason,
        more,
    )


class _NnsightWrapper(NNsight):
    """nnsight's wrapper of a model; inputs go to the model's input device, even if its first parameter is elsewhere."""

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return device_of(self._module)


def _group_by_tensor(reads: Sequence[Read]) -> list[tuple[HookPoint, list[Read]]]:
    """Group reads by module and side, in order."""
    groups: list[tuple[HookPoint, list[Read]]] = []
    for read in reads:
        place = read.place
        group = next((members for at, members in groups if at.module is place.module and at.side == place.side), None)
        if group is None:
            groups.append((place, [read]))
        else:
            group.append(read)
    return groups


def _prepared(model: Lvlm, plan: Plan) -> dict[tuple[Site, str], tuple[tuple[Key, Callable[[Tensor], Tensor]], ...]]:
    """Return the functions of the plan's reductions, by site and token selection."""
    prepared: dict[tuple[Site, str], tuple[tuple[Key, Callable[[Tensor], Tensor]], ...]] = {}
    arrays = {(a.stack, a.component, a.tokens, a.reduction): a for a in plan.schema.arrays if a.reduction}
    for selection, chosen in plan.reductions.items():
        for site in (read.site for read in plan.reads):
            component = f"cross.{site.component}" if site.cross else site.component
            for reduction in chosen:
                info = arrays.get((site.stack, component, str(selection), reduction.name))
                if info is not None and site.layer in info.layers:
                    key = (site, str(selection))
                    prepared[key] = (*prepared.get(key, ()), (info.key, reduction.prepare(model, site)))
    return prepared


def _decoder_only(reads: Reads) -> Reads:
    """Return the reads that a forward pass without an image reaches."""
    decoder_reads = [(view, tuple(r for r in group if r.site.stack == "decoder")) for view, group in reads]
    return tuple((view, group) for view, group in decoder_reads if group)


def _no_vectors(array: ArrayInfo, rows: int) -> Tensor:
    """Return the values of an array for examples whose token selection is empty, because they have no image."""
    if array.ragged:
        return torch.empty((0, array.n_layers, array.width), dtype=torch.float32)
    return torch.full((rows, array.n_layers, array.width), torch.nan)


def _clear(folder: Path) -> None:
    """Remove the files of a store from a folder, and no other files."""
    if not folder.is_dir():
        return
    with explained(lambda reason: f"{folder}: the existing store cannot be removed: {reason}"):
        message = f"{folder}: the store is being written by another process; wait until it ends"
        lock = acquire(
            folder / ".worker-0.lock", required=False, refuse=lambda _: message, transient=True, error=StoreError
        )
        try:
            # Manifests first: if this is interrupted, the remaining files do not look like a finished store.
            for path in sorted(folder.iterdir(), key=lambda p: (not p.name.startswith("manifest"), p.name)):
                ours = path.name in {TENSORS, INDEX} or shard_numbers(path.name) or path.suffix in {".part", ".tmp"}
                ours = ours or (path.name.startswith(".sealed-") and path.suffix == ".jsonl")
                if ours or (path.name.startswith("manifest") and path.suffix == ".json"):
                    path.unlink()
        finally:
            lock.release()
