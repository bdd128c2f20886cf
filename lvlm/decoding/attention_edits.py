"""Read and edit attention at the last queries only, while all other rows run in the usual implementation.

transformers' attention modules call a function that the configuration names (`AttentionInterface`). While an edit is active, the
configuration of the decoder names ours: it calls the function that was active before for all queries, and computes scores and
weights step by step for the edited queries only, so no prompt needs eager attention. The mask comes from the function that was
active before too: without an entry in `AttentionMaskInterface`, transformers passes no mask, and attention would silently not be
causal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError
from lvlm.access.decoder_module import decoder_of
from lvlm.access.replaced_attention import add_replacement, remove_replacement, usual_name
from lvlm.active_interventions import ActiveIntervention, mark_observer
from lvlm.decoding.attention_rows import AttentionRows, attention_scores
from lvlm.decoding.row_layout import RowLayout
from lvlm.family.specification import find
from lvlm.image_tokens import image_in_sequence, image_tokens

if TYPE_CHECKING:
    from lvlm.model import Lvlm

Editor = Callable[[AttentionRows], AttentionRows | None]
"""Function of attention that returns changed attention, or None to change nothing."""
Queries = Literal["last", "last of prompt", "after image", "prompt", "all"]
"""Which queries are edited: ``last``, the last token of the prompt and every generated token; ``last of prompt``, the former
only; ``after image``, every token after the last image token, in rows with an image; ``prompt``, every token of the prompt;
``all``, every token."""

_IMPLEMENTATIONS = ("sdpa", "eager")
_PARTS = 4
"""Largest number of layouts that are remembered."""
_ACTIVE: WeakKeyDictionary[nn.Module, _Edits] = WeakKeyDictionary()


@contextmanager
def edit_attention(
    model: Lvlm,
    editor: Editor,
    *,
    layers: Collection[int] | None = None,
    queries: Queries = "last",
    branches: Collection[int] | None = None,
    registered: bool = False,
) -> Iterator[None]:
    """Edit the self-attention of decoder layers while the context is open.

    Earlier prompt tokens are never edited with ``queries="last"``, in forward passes with and without a cache. What the rows and
    columns of a forward pass are comes from `Lvlm.row_layout`; outside of `lvlm.decoding`, from the inputs of the model (then a
    forward pass without a cache reads a prompt, unless `Lvlm.reading_answers` states where answers begin).

    Several edits are applied in the order in which they were opened. Edits see softcapped scores, and scores without the learned
    sinks of families that have them.

    Parameters
    ----------
    model
        The model.
    editor
        Called for each layer of each forward pass that contains queries to edit.
    layers
        Numbers of decoder layers; all by default.
    queries
        Queries that are edited.
    branches
        Branches whose rows are edited (`RowLayout.branch`); all by default.
    registered
        Whether the caller registers the intervention for provenance (`Lvlm.register`).

    Raises
    ------
    ModelError
        If the attention of the family does not use transformers' interface, if its implementation is neither ``sdpa`` nor
        ``eager``, or for an encoder-decoder.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.decoding.attention_edits import edit_attention
    >>> model, scene = gs.load_lvlm("tiny"), gs.scenes.dataset(10).examples[0]
    >>> def blind(rows):
    ...     return rows.with_scores(rows.scores.masked_fill(rows.image, float("-inf")))
    >>> inputs = model.collate([model.encode(scene)])
    >>> before = model.logits(inputs)
    >>> with edit_attention(model, blind):
    ...     edited = model.logits(inputs)
    >>> bool((edited == before).all()), bool((model.logits(inputs) == before).all())
    (False, True)
    """
    check_attention_edits(model)
    edit = _Edit(editor, None if layers is None else frozenset(layers), queries, branches)
    registration = None
    if not registered:
        name = getattr(editor, "__qualname__", type(editor).__qualname__)
        registration = model.register(ActiveIntervention("attention edit", name, lambda: None))
    try:
        with _open(model, edit):
            yield
    finally:
        if registration is not None:
            registration.remove()


@contextmanager
def read_attention(
    model: Lvlm,
    reader: Callable[[AttentionRows], object],
    *,
    layers: Collection[int] | None = None,
    queries: Queries = "last",
    branches: Collection[int] | None = None,
) -> Iterator[None]:
    """Read the self-attention of decoder layers while the context is open; nothing is changed, not even the last bit.

    The arguments are those of `edit_attention`. Edits that were opened before are visible.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.decoding.attention_edits import read_attention
    >>> model, scene = gs.load_lvlm("tiny"), gs.scenes.dataset(10).examples[0]
    >>> image_mass = []
    >>> with read_attention(model, lambda rows: image_mass.append((rows.weights * rows.image).sum(-1))):
    ...     _ = model.logits(model.collate([model.encode(scene)]))
    >>> len(image_mass), image_mass[0].shape  # layers; rows, heads, queries
    (6, torch.Size([1, 8, 1]))
    """
    check_attention_edits(model)

    def read(rows: AttentionRows) -> None:
        reader(rows)

    with _open(model, _Edit(read, None if layers is None else frozenset(layers), queries, branches)):
        yield


def check_attention_edits(model: Lvlm) -> None:
    """Raise `ModelError` if attention of a model cannot be edited."""
    if model.encoder_decoder:
        msg = f"attention edits are for decoders that read the prompt, and {model.name} ({model.spec.model_type}) has an encoder"
        raise ModelError(msg)
    modules = attention_modules(model)
    other = next((m for m in modules if not _uses_interface(m)), None)
    if other is not None or not modules:
        what = "its attention" if other is None else f"its {type(other).__name__}"
        msg = (
            f"attention of {model.name} ({model.spec.model_type}) cannot be edited: {what} does not call transformers' "
            "AttentionInterface"
        )
        raise ModelError(msg)
    implementation = usual_attention(model)
    if implementation not in _IMPLEMENTATIONS:
        msg = (
            f"attention of {model.name} cannot be edited under the implementation '{implementation}'; load the model with "
            "attn_implementation sdpa or eager"
        )
        raise ModelError(msg)


def attention_modules(model: Lvlm) -> dict[nn.Module, int]:
    """Return the self-attention modules of the decoder, and the number of the layer of each."""
    modules: dict[nn.Module, int] = {}
    for number, layer in enumerate(model.layers("decoder")):
        module = find(layer, model.spec.decoder.attention) if model.attends("decoder", number, cross=False) else None
        if isinstance(module, nn.Module):
            modules[module] = number
    return modules


def current_layout(model: Lvlm) -> RowLayout:
    """Return the layout of the current forward pass, while an edit or a reader of attention is active.

    Raises
    ------
    ModelError
        If the image tokens of the pass are unknown.
    """
    if model.row_layout is not None:
        return model.row_layout
    return _ACTIVE[model.hf].outside.layout()


def usual_attention(model: Lvlm) -> str | None:
    """Return the attention implementation of the decoder that runs without edits, by transformers' name."""
    return usual_name(next((config._attn_implementation for config in attention_configs(model)), None))


@contextmanager
def without_attention_edits(model: Lvlm) -> Iterator[None]:
    """Suspend all edits of attention while the context is open."""
    edits = _ACTIVE.get(model.hf)
    if edits is None:
        yield
        return
    before, edits.edits = edits.edits, []
    try:
        yield
    finally:
        edits.edits = before


@dataclass(frozen=True, eq=False)
class _Edit:
    editor: Editor
    layers: frozenset[int] | None
    queries: Queries
    branches: Collection[int] | None


@dataclass(frozen=True, eq=False)
class _Selection:
    """Queries of one forward pass that an edit acts on."""

    mask: Tensor
    """bool ``[rows, queries]``."""
    first: int
    """First query at which some row is edited; the number of queries if none is."""
    every: bool
    """Whether all rows and queries are edited."""


@contextmanager
def _open(model: Lvlm, edit: _Edit) -> Iterator[None]:
    edits = _ACTIVE.get(model.hf)
    if edits is not None:
        edits.edits.append(edit)
        try:
            yield
        finally:
            edits.edits.remove(edit)
        return
    edits = _Edits(model)
    edits.edits.append(edit)
    with edits.installed():
        yield


class _Edits:
    """The attention function of one model while edits are active."""

    def __init__(self, model: Lvlm) -> None:
        self.model = model
        self.edits: list[_Edit] = []
        self.usual = usual_attention(model) or "eager"
        self.name = f"groundscope_edits_{id(model.hf):x}"
        self._numbers = attention_modules(model)
        self.outside = _LayoutOutside(model)
        self._layout: RowLayout | None = None
        self._columns: dict[int, RowLayout] = {}
        self._selections: dict[tuple[_Edit, int, int], _Selection] = {}
        self._known: dict[RowLayout, tuple[dict[int, RowLayout], dict[tuple[_Edit, int, int], _Selection]]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the decoder call this object while the context is open."""
        from transformers import AttentionInterface, AttentionMaskInterface

        configs = attention_configs(self.model)
        before = [config._attn_implementation for config in configs]
        # Bound methods have no attributes that transformers may set; plain functions do.
        AttentionInterface.register(self.name, lambda *args, **kwargs: self.attend(*args, **kwargs))
        AttentionMaskInterface.register(self.name, lambda *args, **kwargs: self.mask(*args, **kwargs))
        hooks = self.outside.hooks()
        _ACTIVE[self.model.hf] = self
        add_replacement(self.name, self)
        try:
            for config in configs:
                config._attn_implementation_internal = self.name
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation_internal = implementation
            del _ACTIVE[self.model.hf]
            remove_replacement(self.name)
            for hook in hooks:
                hook.remove()
            AttentionInterface._global_mapping.pop(self.name, None)
            AttentionMaskInterface._global_mapping.pop(self.name, None)

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mask of the usual implementation."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        return ALL_MASK_ATTENTION_FUNCTIONS[self.usual](*args, **kwargs)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of a layer's heads, ``[rows, queries, heads, width]``, and their weights if they are computed."""
        number = self._numbers.get(module)
        edits = [e for e in self.edits if number is not None and (e.layers is None or number in e.layers)]
        selections = [self._select(edit, query.shape[2], key.shape[2], len(query)) for edit in edits]
        first = min((s.first for s in selections), default=query.shape[2])
        if number is None or first == query.shape[2]:
            return attention_function(module, self.usual)(module, query, key, value, attention_mask, **options)
        scores = attention_scores(module, query, key, attention_mask, first, options)
        layout = self._columns_of(key.shape[2])
        unmasked = attention_mask is None and first == query.shape[2] - 1  # the last query attends to all keys
        queries = selections[0].mask[:, first:]
        rows = AttentionRows(number, scores, value, layout, queries, options.get("s_aux"), unmasked)
        changed: list[_Selection] = []
        for edit, selection in zip(edits, selections, strict=True):
            if selection.first == query.shape[2]:
                continue
            rows = rows.with_queries(selection.mask[:, first:])
            edited = edit.editor(rows)
            if edited is not None and edited is not rows:
                rows = edited if selection.every else rows.merged(edited)
                changed.append(selection)
        if any(s.every for s in changed):
            weights = rows.weights.to(query.dtype) if self.usual == "eager" else None
            return rows.outputs.transpose(1, 2).to(query.dtype), weights
        out, weights = attention_function(module, self.usual)(module, query, key, value, attention_mask, **options)
        if not changed:
            return out, weights
        mask = torch.stack([s.mask[:, first:] for s in changed]).any(0)[:, :, None, None]
        new = torch.where(mask, rows.outputs.transpose(1, 2).to(out.dtype), out[:, first:])
        if weights is not None:
            part = torch.where(mask.transpose(1, 2), rows.weights.to(weights.dtype), weights[:, :, first:])
            weights = torch.cat([weights[:, :, :first], part], dim=2)
        return torch.cat([out[:, :first], new], dim=1), weights

    def _select(self, edit: _Edit, queries: int, keys: int, rows: int) -> _Selection:
        """Return the queries of the current forward pass that an edit acts on; computed once per pass."""
        layout = self.model.row_layout or self.outside.layout()
        if layout is not self._layout:
            # The parts of a joined prefill alternate in each layer; other passes follow one another.
            if layout not in self._known:
                self._known = {} if len(self._known) > _PARTS else self._known
                self._known[layout] = {}, {}
            self._layout, (self._columns, self._selections) = layout, self._known[layout]
        if len(layout.branch) != rows:
            msg = f"a forward pass of {rows} rows has a layout of {len(layout.branch)}; attention cannot be edited"
            raise ModelError(msg)
        which = (edit, queries, keys)
        if which not in self._selections:
            self._selections[which] = _selection(edit, self._columns_of(keys), queries)
        return self._selections[which]

    def _columns_of(self, keys: int) -> RowLayout:
        """Return the layout of the last `keys` columns; a cache with a sliding window has no others."""
        layout = self._layout
        if layout is None or layout.valid.shape[1] < keys:
            msg = f"{self.model.name}: attention has more keys than the prompt and the answer have tokens, and cannot be edited"
            raise ModelError(msg)
        if keys not in self._columns:
            skipped = layout.valid.shape[1] - keys
            self._columns[keys] = (
                RowLayout(
                    layout.branch,
                    layout.image[:, skipped:],
                    layout.valid[:, skipped:],
                    max(layout.prompt - skipped, 0),
                    {name: mask[:, skipped:] for name, mask in layout.marks.items()},
                )
                if skipped
                else layout
            )
        return self._columns[keys]


def _selection(edit: _Edit, layout: RowLayout, queries: int) -> _Selection:
    keys = layout.valid.shape[1]
    columns = torch.arange(keys, device=layout.valid.device)
    if edit.queries == "last":
        mask = layout.valid & (columns >= layout.prompt - 1)
    elif edit.queries == "last of prompt":
        mask = layout.valid & (columns == layout.prompt - 1)
    elif edit.queries == "prompt":
        mask = layout.valid & (columns < layout.prompt)
    elif edit.queries == "after image":
        mask = layout.after_image & layout.image.any(1, keepdim=True)
    else:
        mask = layout.valid.clone()
    if edit.branches is not None:
        numbers = torch.tensor(sorted(edit.branches), device=layout.branch.device)
        mask = mask & torch.isin(layout.branch, numbers)[:, None]
    mask = mask[:, keys - queries :]
    edited = mask.any(0).nonzero().flatten()
    return _Selection(mask, int(edited[0]) if len(edited) else queries, bool(mask.all()))


class _LayoutOutside:
    """The layout of forward passes outside of `lvlm.decoding`, from the inputs of the model."""

    def __init__(self, model: Lvlm) -> None:
        self._model = model
        self._inputs: dict[str, Any] | None = None
        self._past = 0
        self._layout: RowLayout | None = None
        self._current: RowLayout | None = None

    def hooks(self) -> list[Any]:
        """Register the hooks that read the inputs."""
        hf = self._model.hf
        return [
            hf.register_forward_pre_hook(self._enter, with_kwargs=True),
            hf.register_forward_hook(self._leave, always_call=True),
        ]

    @mark_observer
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._model.row_layout is None and self._inputs is None:
            names = list(inspect.signature(module.forward).parameters) if args else []
            self._inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            cache = self._inputs.get("past_key_values")
            length = getattr(cache, "get_seq_length", None)
            self._past = 0 if length is None else int(length())
            self._current = None

    @mark_observer
    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._inputs = self._current = None

    def layout(self) -> RowLayout:
        """Return the layout of the current forward pass."""
        if self._current is None:
            self._layout = self._current = self._compute()
        return self._current

    def _compute(self) -> RowLayout:
        ids = None if self._inputs is None else self._inputs.get("input_ids")
        before = self._layout
        continues = self._past > 0 and before is not None and before.valid.shape[1] == self._past
        if self._inputs is None or not isinstance(ids, Tensor) or ids.dim() != 2 or (self._past and not continues):
            msg = (
                f"attention of {self._model.name} is edited in a forward pass whose image tokens are unknown; pass input_ids to "
                "the model, and open the edit before the prompt is read"
            )
            raise ModelError(msg)
        if before is not None and continues:
            for _ in range(ids.shape[1]):
                before = before.with_column()
            return before
        mask = self._inputs.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            valid = mask.bool()
        image = torch.zeros_like(valid)
        if image_in_sequence(self._model):
            image = image_tokens(self._model, self._inputs).to(valid.device)
        start = self._model.answer_from
        prompt = ids.shape[1] if start is None else min(start, ids.shape[1])
        return RowLayout(torch.zeros(len(ids), dtype=torch.long, device=ids.device), image, valid, prompt)


def attention_configs(model: Lvlm) -> list[Any]:
    """Return the configurations that name the decoder's attention function, and those that its masks are made for."""
    modules = [*attention_modules(model), decoder_of(model)]
    configs = [m.config for m in modules if hasattr(getattr(m, "config", None), "_attn_implementation")]
    return list({id(c): c for c in configs}.values())


def attention_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the function that an attention module calls for an implementation."""
    names = _globals(module)
    return names["ALL_ATTENTION_FUNCTIONS"].get_interface(name, names.get("eager_attention_forward"))


def _uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and "ALL_ATTENTION_FUNCTIONS" in code.co_names
        and "eager_attention_forward" in _globals(module)
        and hasattr(getattr(module, "config", None), "_attn_implementation")
    )


def _globals(module: nn.Module) -> dict[str, Any]:
    return inspect.unwrap(type(module).forward).__globals__
