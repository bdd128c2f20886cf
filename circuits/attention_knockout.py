"""Attention knockout: block attention between token sets in a window of layers and measure the effect on the answer.

Sources: Geva et al. 2023 (arXiv 2304.14767); for vision-language models Zhang et al. 2024 (arXiv 2411.18620).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from circuits.patching.activation import check_evaluating
from circuits.patching.metrics import probability
from circuits.results.statistics import mean_interval
from concepts.schema import Example
from groundscope.core.artifacts import freeze
from groundscope.core.errors import ConfigError, ModelError, PatchError, SiteError
from groundscope.core.progress import progress_bar
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import rates_of_columns
from groundscope.core.text import format_count
from lvlm.active_interventions import ActiveIntervention, mark_intervention
from lvlm.answer_keys import answer_key
from lvlm.encoding.encode import Batch
from lvlm.family.specification import TOLERANCE, resolve
from lvlm.intervention_digest import digest_of
from lvlm.model import Lvlm
from lvlm.token_map import TokenMap
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    import pandas as pd

TOKENS = ("last", "image:all", "question:all", "prefix:all", "object:all")
WINDOW = 9
"""Number of adjacent layers to block jointly (both sources)."""
_BY_EXAMPLE = ("ids", "groups", "levels")


@dataclass(frozen=True, eq=False)
class Knockout:
    """Change of the true answer's probability when attention is blocked; returned by `sweep`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> knockout = gs.attention_knockout.sweep(model, questions, windows=[[0, 1, 2]])
    >>> knockout.target, knockout.source, knockout.change.shape[1]
    ('last', 'image:all', 1)
    """

    target: str
    """Tokens that may not attend ..."""
    source: str
    """... to these tokens."""
    window: int
    windows: tuple[tuple[int, ...], ...]
    """Layers that are blocked jointly."""
    probability: np.ndarray
    """Probability of the true answer's first token without knockout, float32 ``[n_examples]``."""
    change: np.ndarray
    """Relative change, ``(knockout - probability) / probability``, float32 ``[n_examples, n_windows]``; at least -1."""
    right: np.ndarray
    """Whether the model still prefers the true answer, bool ``[n_examples, n_windows]``."""
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    levels: tuple[str, ...]
    wrong: int
    """Number of examples excluded because the model answers them incorrectly."""
    without: int
    """Number of examples excluded because they lack such tokens (for example, the object in question is absent)."""
    model: str
    config_hash: str
    weights_hash: str

    __repr__ = short_repr

    def __post_init__(self) -> None:
        freeze(self)

    def select(self, keep: np.ndarray) -> Self:
        """Return the results of a subset of the examples, selected by a boolean mask or by indices."""
        which = np.arange(len(self.ids))[keep]
        parts: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in which) for name in _BY_EXAMPLE}
        parts |= {name: getattr(self, name)[which] for name in ("probability", "change", "right")}
        return replace(self, **parts)

    def frame(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """Return one row per window: first and last layer, mean change, share still correct, with intervals over groups."""
        import pandas as pd

        columns: dict[str, object] = {"first": [w[0] for w in self.windows], "last": [w[-1] for w in self.windows]}
        for name, values, interval in (
            ("change", self.change, mean_interval),
            ("right", self.right, rates_of_columns),
        ):
            low, high = interval(values, self.groups, confidence)
            columns |= {name: values.mean(axis=0, dtype=float), f"{name}_low": low, f"{name}_high": high}
        return pd.DataFrame(columns)


def layer_windows(n_layers: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Return the window around each layer, truncated at the ends; an even size extends one layer further back.

    Examples
    --------
    >>> from circuits.attention_knockout import layer_windows
    >>> layer_windows(4, 3)
    ((0, 1), (0, 1, 2), (1, 2, 3), (2, 3))
    """
    return tuple(
        tuple(range(max(0, layer - size // 2), min(n_layers, layer + (size - 1) // 2 + 1))) for layer in range(n_layers)
    )


@torch.no_grad()
def sweep(
    model: Lvlm,
    examples: Sequence[Example],
    *,
    target: str = "last",
    source: str = "image:all",
    window: int = WINDOW,
    windows: Sequence[Sequence[int]] | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Knockout:
    """Block attention from target to source tokens in each window of layers, on correctly answered questions.

    Before the softmax, the scores of blocked connections become minus infinity; the model's own mask stays in force. A
    token always attends to itself.

    Parameters
    ----------
    model
        In evaluation mode, its decoder's attention computed by ``sdpa`` or ``eager``.
    examples
        Questions with candidate answers.
    target, source
        ``image:all``: image tokens; ``question:all``: tokens of the question; ``last``: the last prompt token;
        ``object:all``: image tokens of the object in question; ``prefix:all``: the written start of the answer.
    window
        Number of layers to block jointly, centered on each layer in turn.
    windows
        The layers to block jointly, listed explicitly; overrides `window`.
    batch_size
        Number of examples per batch.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Raises
    ------
    ConfigError
        If `window` is less than 1.
    SiteError
        If a token selection is unknown or ambiguous, or the model has no such layer.
    PatchError
        If no example is answered correctly and has such tokens, or the model is in training mode.
    ModelError
        If the family's attention does not take an additive mask; checked by a forward pass on the first examples.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> knockout = gs.attention_knockout.sweep(model, questions, windows=[[0, 1], [4, 5]])
    >>> knockout.frame()[["first", "last"]].values.tolist()
    [[0, 1], [4, 5]]
    """
    if window < 1:
        msg = f"window={window} must be at least 1 layer"
        raise ConfigError(msg)
    queries, keys = (TokenSelection.parse(tokens, allowed=TOKENS) for tokens in (target, source))
    check_evaluating(model)
    cuts = layer_windows(model.n_layers, window) if windows is None else tuple(tuple(w) for w in windows)
    outside = sorted({layer for w in cuts for layer in w if not 0 <= layer < model.n_layers})
    if outside or not cuts or not all(cuts):
        msg = f"invalid windows {list(cuts)}: {model.name} has layers 0-{model.n_layers - 1}; a window needs at least one layer"
        raise SiteError(msg)
    answered, before, wrong, without = _answered(model, examples, queries, keys, batch_size)
    change = np.empty((len(answered), len(cuts)), np.float32)
    right = np.empty((len(answered), len(cuts)), bool)
    with progress_bar(progress) as bar:
        task = bar.add_task("cutting attention", total=len(answered) * len(cuts))
        for number, batch in enumerate(model.batches(answered, batch_size)):
            rows = list(batch.index)
            block = _block(batch, queries, keys).to(model.device)
            if number == 0:
                _check_mask(model, batch, block, cuts[0][0])
            for column, layers in enumerate(cuts):
                with blocked(model, layers, block):
                    after, margins = _read(model, batch)
                change[rows, column] = after / before[rows] - 1
                right[rows, column] = margins > 0
                bar.advance(task, len(rows))
    return Knockout(
        target=str(queries),
        source=str(keys),
        window=window if windows is None else max(len(w) for w in cuts),
        windows=cuts,
        probability=before,
        change=change,
        right=right,
        ids=tuple(e.id for e in answered),
        groups=tuple(e.group for e in answered),
        levels=tuple(e.level or "" for e in answered),
        wrong=wrong,
        without=without,
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
    )


@contextmanager
def blocked(model: Lvlm, layers: Sequence[int], block: Tensor) -> Iterator[None]:
    """Block connections of the decoder's attention while the context is open.

    Parameters
    ----------
    model
        The model.
    layers
        Layers to block in.
    block
        Bool ``[rows, queries, keys]``: True blocks the connection. Every query must keep at least one key.

    Raises
    ------
    ModelError
        During a forward pass, if a layer's attention does not receive a mask that can be modified.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> import torch
    >>> example = gs.scenes.dataset(n_images=10, seed=0)[0]
    >>> encoding = model.encode(example)
    >>> block = torch.zeros(1, encoding.tokens.length, encoding.tokens.length, dtype=torch.bool)
    >>> block[:, encoding.tokens.last, list(encoding.tokens.image)] = True
    >>> with gs.attention_knockout.blocked(model, [0, 1], block):
    ...     logits = model.logits(encoding.inputs)
    >>> logits.shape[0]
    1
    """

    @mark_intervention
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask", _MISSING)
        additive = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
        if not additive or block.shape[1] != hidden.shape[1]:
            received = f"a mask of {mask.dim()} axes" if isinstance(mask, Tensor) else "no attention_mask argument"
            msg = (
                f"{model.name} (family '{model.spec.model_type}'): {type(module).__name__} receives {received} for "
                f"hidden states {list(hidden.shape)}, but knockout needs a mask [rows, heads, queries, keys]; load the "
                "model with attn_implementation='eager' or 'sdpa'"
            )
            raise ModelError(msg)
        cut = block.to(hidden.device)[:, None]  # [B, 1, queries, keys]
        if mask is None:
            allowed = torch.ones(block.shape[1:], dtype=torch.bool, device=hidden.device)
            mask = allowed.tril() if getattr(module, "is_causal", True) else allowed
            mask = mask[None, None]
        mask = mask & ~cut if mask.dtype == torch.bool else mask.masked_fill(cut, float("-inf"))
        if not mask.is_floating_point() and _eager(module):
            # Eager attention adds its mask to the scores.
            mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
        return args, {**kwargs, "attention_mask": mask}

    applied = ActiveIntervention(
        "attention knockout", f"layers {', '.join(map(str, layers))}", lambda: digest_of([*layers, block])
    )
    with ExitStack() as hooks:
        hooks.callback(model.register(applied).remove)
        for layer in layers:
            module = resolve(model.layers("decoder")[layer], model.spec.decoder.attention, model.spec)
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


_MISSING = object()


def _eager(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", "eager") == "eager"


def _positions(tokens: TokenMap, selection: TokenSelection) -> tuple[int, ...]:
    if selection.role == "image":
        return tokens.image
    if selection.role == "object":
        has_object = tokens.subject is not None and tokens.subject in tokens.boxes
        return tokens.object(tokens.subject or "") if has_object else ()
    return tokens.positions(selection)


def _block(batch: Batch, target: TokenSelection, source: TokenSelection) -> Tensor:
    """Return the connections to block, bool ``[rows, queries, keys]``."""
    length = batch.encodings[0].tokens.length
    out = torch.zeros(len(batch.encodings), length, length, dtype=torch.bool)
    for row, encoding in enumerate(batch.encodings):
        queries, keys = (torch.tensor(_positions(encoding.tokens, selection)) for selection in (target, source))
        out[row, queries[:, None], keys[None]] = True
    out.diagonal(dim1=1, dim2=2).fill_(False)
    return out


def _read(model: Lvlm, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability and the margin of each true answer."""
    rows = []
    for encoding, row in zip(batch.encodings, model.logits(batch.inputs), strict=True):
        example, key = encoding.example, answer_key(model, encoding.example)
        rows.append((float(probability(row, key, example.answer)), float(key.margin(row.float(), example.answer))))
    probabilities, margins = np.array(rows, np.float32).T
    return probabilities, margins


def _answered(
    model: Lvlm, examples: Sequence[Example], target: TokenSelection, source: TokenSelection, batch_size: int
) -> tuple[list[Example], np.ndarray, int, int]:
    """Return correctly answered examples with such tokens, their probabilities, and both counts of excluded examples."""
    if not examples:
        msg = "examples is empty; pass at least one"
        raise PatchError(msg)
    has, probabilities, margins = np.zeros(len(examples), bool), np.empty(len(examples)), np.empty(len(examples))
    for batch in model.batches(examples, batch_size):
        rows = list(batch.index)
        probabilities[rows], margins[rows] = _read(model, batch)
        has[rows] = [all(_positions(e.tokens, selection) for selection in (target, source)) for e in batch.encodings]
    keep = has & (margins > 0)
    if not keep.any():
        msg = (
            f"none of {format_count(len(examples), 'example')} is answered correctly and has tokens of both roles: "
            f"{int((~has).sum())} lack '{target}' or '{source}' (no object in question, or an image read by "
            f"cross-attention), {int((has & (margins <= 0)).sum())} of the others are answered incorrectly"
        )
        raise PatchError(msg)
    answered = [e for e, k in zip(examples, keep, strict=True) if k]
    return answered, probabilities[keep].astype(np.float32), int((has & ~keep).sum()), int((~has).sum())


def _check_mask(model: Lvlm, batch: Batch, block: Tensor, layer: int) -> None:
    """Raise `ModelError` unless an empty mask changes no logit and a mask that blocks removes the attention."""
    plain = model.logits(batch.inputs).float()
    with blocked(model, range(model.n_layers), torch.zeros_like(block)):
        unmasked = model.logits(batch.inputs).float()
    error = float((plain - unmasked).abs().max()) / max(float(plain.abs().max()), 1e-6)
    site = f"decoder.L{layer}.pattern"
    with blocked(model, [layer], block):
        pattern = model.read(batch.inputs, [site], quiet=True)[site]  # [B, H, queries, keys]
    remaining = float((pattern * block[:, None]).abs().max())
    if not error <= TOLERANCE[model.dtype] or remaining > 0:
        msg = (
            f"{model.name} (family '{model.spec.model_type}'): its attention does not take an additive mask: an empty mask "
            f"changes the logits by {error:.1e}, a mask that blocks leaves attention of {remaining:.1e}"
        )
        raise ModelError(msg)
