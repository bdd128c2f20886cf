"""Attention knockout: keep some tokens from attending to others in a window of layers, and see what the answer loses.

Sources: Geva et al. 2023 (arXiv 2304.14767); for vision-language models Zhang et al. 2024 (arXiv 2411.18620).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from circuits.patching.activation import check_evaluating
from circuits.patching.metrics import probability
from circuits.results.statistics import mean_interval
from concepts.schema import Example
from groundscope.core.errors import ConfigError, ModelError, PatchError, SiteError
from groundscope.core.progress import progress_bar
from lvlm.answers import answer_key
from lvlm.applied import Applied, registered
from lvlm.digest import digest_of
from lvlm.encoding.encode import Batch
from lvlm.family.specification import TOLERANCE, resolve
from lvlm.model import Lvlm
from lvlm.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd

Role = Literal["image", "question", "last", "object"]
ROLES: tuple[Role, ...] = ("image", "question", "last", "object")
WINDOW = 9
"""How many layers are cut at a time (both sources)."""
_BY_EXAMPLE = ("ids", "groups", "levels")


@dataclass(frozen=True, eq=False)
class Knockout:
    """What the right answer's probability loses when attention is cut; made by `sweep`."""

    target: Role
    """Tokens that were kept from attending ..."""
    source: Role
    """... to these."""
    window: int
    windows: tuple[tuple[int, ...], ...]
    """Layers that were cut together."""
    probability: np.ndarray
    """Of the true answer's first token, uncut, float32 ``[n_examples]``."""
    change: np.ndarray
    """Relative change of it, ``(cut - uncut) / uncut``, float32 ``[n_examples, n_windows]``: -1 where all is lost."""
    right: np.ndarray
    """Whether the true answer is still preferred, bool ``[n_examples, n_windows]``."""
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    levels: tuple[str, ...]
    wrong: int
    """Number of examples left out because the model answers them wrongly."""
    without: int
    """Number of those left out because they have no such tokens, as where the object asked about is not there."""
    model: str
    config_hash: str
    weights_hash: str

    def __post_init__(self) -> None:
        for name in ("probability", "change", "right"):
            getattr(self, name).setflags(write=False)

    def select(self, keep: np.ndarray) -> Self:
        """Return the knockout of some examples only: a boolean mask or numbers."""
        which = np.arange(len(self.ids))[keep]
        parts: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in which) for name in _BY_EXAMPLE}
        parts |= {name: getattr(self, name)[which] for name in ("probability", "change", "right")}
        return replace(self, **parts)

    def frame(self, level: float = 0.95) -> pd.DataFrame:
        """Return one row a window: first and last layer, mean change and share still right, with intervals over groups."""
        import pandas as pd

        columns: dict[str, object] = {"first": [w[0] for w in self.windows], "last": [w[-1] for w in self.windows]}
        for name, values in (("change", self.change), ("right", self.right)):
            low, high = mean_interval(values, self.groups, level)
            columns |= {name: values.mean(axis=0, dtype=float), f"{name}_low": low, f"{name}_high": high}
        return pd.DataFrame(columns)


def layer_windows(n_layers: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Return for each layer the window around it, cut off at the ends; an even size reaches one further back."""
    return tuple(
        tuple(range(max(0, layer - size // 2), min(n_layers, layer + (size - 1) // 2 + 1))) for layer in range(n_layers)
    )


@torch.no_grad()
def sweep(
    model: Lvlm,
    examples: Sequence[Example],
    target: Role = "last",
    source: Role = "image",
    *,
    window: int = WINDOW,
    windows: Sequence[Sequence[int]] | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Knockout:
    """Cut attention from some tokens to others, window after window, on the questions the model answers right.

    Before the softmax the logits of the cut connections become minus infinity; whatever else is masked stays so. A
    token always attends to itself.

    Parameters
    ----------
    model
        In evaluation mode, its decoder's attention computed by ``sdpa`` or ``eager``.
    examples
        Questions with candidate answers.
    target, source
        ``image``: its tokens; ``question``: the question's own; ``last``: the last prompt token; ``object``: image
        tokens of the object asked about.
    window
        Number of layers cut together, around each layer in turn.
    windows
        The layers to cut together, spelled out; then `window` is not used.
    batch_size
        Examples side by side.
    progress
        Show progress; by default where standard error is a terminal.

    Raises
    ------
    ConfigError
        For a role that does not exist, a window of less than 1.
    SiteError
        For a layer that the model lacks.
    PatchError
        For no examples, or none that is answered right and has such tokens, or a model in training mode.
    ModelError
        Where the family's attention does not take an additive mask: shown by a forward on the first examples.
    """
    if target not in ROLES or source not in ROLES or window < 1:
        msg = f"from '{target}' to '{source}', window={window}: choose roles of {ROLES} and at least 1 layer"
        raise ConfigError(msg)
    check_evaluating(model)
    cuts = layer_windows(model.n_layers, window) if windows is None else tuple(tuple(w) for w in windows)
    outside = sorted({layer for w in cuts for layer in w if not 0 <= layer < model.n_layers})
    if outside or not cuts or not all(cuts):
        msg = f"windows {list(cuts)}: {model.name} has layers 0-{model.n_layers - 1}, and a window needs one"
        raise SiteError(msg)
    kept, before, wrong, without = _answered(model, examples, target, source, batch_size)
    change = np.empty((len(kept), len(cuts)), np.float32)
    right = np.empty((len(kept), len(cuts)), bool)
    with progress_bar(progress) as bar:
        task = bar.add_task("cutting attention", total=len(kept) * len(cuts))
        for number, batch in enumerate(model.batches(kept, batch_size)):
            rows = list(batch.index)
            block = _block(batch, target, source).to(model.device)
            if number == 0:
                _check_mask(model, batch, block, cuts[0][0])
            for k, layers in enumerate(cuts):
                with blocked(model, layers, block):
                    after, margins = _read(model, batch)
                change[rows, k] = after / before[rows] - 1
                right[rows, k] = margins > 0
                bar.advance(task, len(rows))
    return Knockout(
        target=target,
        source=source,
        window=window if windows is None else max(len(w) for w in cuts),
        windows=cuts,
        probability=before,
        change=change,
        right=right,
        ids=tuple(e.id for e in kept),
        groups=tuple(e.group for e in kept),
        levels=tuple(e.level for e in kept),
        wrong=wrong,
        without=without,
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
    )


@contextmanager
def blocked(model: Lvlm, layers: Sequence[int], block: Tensor) -> Iterator[None]:
    """Keep connections of the decoder's attention from being used while the context is open.

    Parameters
    ----------
    model
        The model.
    layers
        Where.
    block
        Bool ``[rows, queries, keys]``: what may not be attended to. A query must keep at least one key.

    Raises
    ------
    ModelError
        During a forward, where a layer's attention is not given a mask that can be added to.
    """

    @registered
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask", _MISSING)
        takes = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
        if not takes or block.shape[1] != hidden.shape[1]:
            given = f"a mask of {mask.dim()} axes" if isinstance(mask, Tensor) else "no attention_mask of its own"
            msg = (
                f"{model.name} (family '{model.spec.model_type}'): {type(module).__name__} is given {given} for "
                f"{list(hidden.shape)}, where [rows, heads, queries, keys] is needed; attention cannot be cut there "
                "(with other than 'eager' or 'sdpa' attention, set one of them first)"
            )
            raise ModelError(msg)
        cut = block.to(hidden.device)[:, None]  # [B, 1, queries, keys]
        if mask is None:
            allowed = torch.ones(block.shape[1:], dtype=torch.bool, device=hidden.device)
            mask = allowed.tril() if getattr(module, "is_causal", True) else allowed
            mask = mask[None, None]
        mask = mask & ~cut if mask.dtype == torch.bool else mask.masked_fill(cut, float("-inf"))
        if not mask.is_floating_point() and _eager(module):
            # Attention computed step by step adds its mask.
            mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
        return args, {**kwargs, "attention_mask": mask}

    applied = Applied(
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


def _positions(tokens: TokenMap, role: Role) -> tuple[int, ...]:
    if role == "last":
        return (tokens.last,)
    if role == "image":
        return tokens.image
    if role == "question":
        return tokens.question
    known = tokens.subject is not None and tokens.subject in tokens.boxes
    return tokens.object(tokens.subject or "") if known else ()


def _block(batch: Batch, target: Role, source: Role) -> Tensor:
    """Return what may not be attended to, bool ``[rows, queries, keys]``."""
    length = batch.encodings[0].tokens.length
    out = torch.zeros(len(batch.encodings), length, length, dtype=torch.bool)
    for row, encoding in enumerate(batch.encodings):
        queries, keys = (torch.tensor(_positions(encoding.tokens, role)) for role in (target, source))
        out[row, queries[:, None], keys[None]] = True
    out.diagonal(dim1=1, dim2=2).fill_(False)
    return out


def _read(model: Lvlm, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return probability and margin of each true answer."""
    found = []
    for encoding, row in zip(batch.encodings, model.logits(batch.inputs), strict=True):
        example, key = encoding.example, answer_key(model, encoding.example)
        found.append((float(probability(row, key, example.answer)), float(key.margin(row.float(), example.answer))))
    chances, margins = np.array(found, np.float32).T
    return chances, margins


def _answered(
    model: Lvlm, examples: Sequence[Example], target: Role, source: Role, batch_size: int
) -> tuple[list[Example], np.ndarray, int, int]:
    """Return the examples answered right that have such tokens, their probabilities, and how many were left out why."""
    if not examples:
        msg = "no examples to cut attention on"
        raise PatchError(msg)
    has, chances, margins = np.zeros(len(examples), bool), np.empty(len(examples)), np.empty(len(examples))
    for batch in model.batches(examples, batch_size):
        rows = list(batch.index)
        chances[rows], margins[rows] = _read(model, batch)
        has[rows] = [all(_positions(e.tokens, role) for role in (target, source)) for e in batch.encodings]
    keep = has & (margins > 0)
    if not keep.any():
        msg = (
            f"none of {len(examples)} examples is answered right and has tokens of both roles: {int((~has).sum())} lack "
            f"'{target}' or '{source}' (no object asked about, or an image that is read by cross-attention), "
            f"{int((has & (margins <= 0)).sum())} of the others are answered wrongly"
        )
        raise PatchError(msg)
    kept = [e for e, k in zip(examples, keep, strict=True) if k]
    return kept, chances[keep].astype(np.float32), int((has & ~keep).sum()), int((~has).sum())


def _check_mask(model: Lvlm, batch: Batch, block: Tensor, layer: int) -> None:
    """Raise `ModelError` unless a mask that cuts nothing changes nothing, and one that cuts leaves no attention there."""
    plain = model.logits(batch.inputs).float()
    with blocked(model, range(model.n_layers), torch.zeros_like(block)):
        again = model.logits(batch.inputs).float()
    error = float((plain - again).abs().max()) / max(float(plain.abs().max()), 1e-6)
    site = f"decoder.L{layer}.pattern"
    with blocked(model, [layer], block):
        pattern = model.read(batch.inputs, [site], quiet=True)[site]  # [B, H, queries, keys]
    left = float((pattern * block[:, None]).abs().max())
    if not error <= TOLERANCE[model.dtype] or left > 0:
        msg = (
            f"{model.name} (family '{model.spec.model_type}'): its attention does not take an additive mask: one that cuts "
            f"nothing changes the logits by {error:.1e}, one that cuts leaves attention of {left:.1e}"
        )
        raise ModelError(msg)
