"""Arguments of a decoder layer for a batch of suffixes instead of full prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from circuits.execution.prefix_attention import NotShared
from circuits.execution.prefix_cache import CACHE, Recording

# By argument name: the axis of examples and the axis of positions, counted from the end.
_AXES = {
    "position_embeddings": (-3, -2),
    "position_ids": (-2, -1),
    "cache_position": (None, -1),
    "full_text_row_masked_out_mask": (-4, -2),
}
# Arguments that only attention uses; it takes them from the recording.
_ATTENDED = ("attention_mask", "cross_attention_mask", "cross_attention_states", "causal_mask")


class _Suffix:
    """The cache interface that a decoder layer uses; it returns new keys and values only, as the prefix is shared."""

    def __init__(self, run: Recording, start: int) -> None:
        self._run, self._start = run, start

    @property
    def layers(self) -> list[SimpleNamespace]:
        """Keys and values by layer, for cross-attention."""
        return [SimpleNamespace(keys=k, values=v) for k, v in zip(self._run.keys, self._run.values, strict=True)]

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values unchanged."""
        return keys, values

    def get_seq_length(self, *_args: Any) -> int:
        """Return the number of positions before the suffix."""
        return self._start


def arguments_for(run: Recording, layer: int, start: int, which: Tensor, rows: int) -> dict[str, Any]:
    """Return a layer's arguments, except the hidden states ``[P rows, S, D]``, for the examples `which`.

    Raises
    ------
    NotShared
        If an argument is a tensor of unknown meaning.
    """
    arguments: dict[str, Any] = {}
    for name, value in run.arguments[layer].items():
        if value is CACHE:
            arguments[name] = _Suffix(run, start)
        elif name in _ATTENDED:
            arguments[name] = None
        elif name in _AXES and isinstance(value, Tensor):
            arguments[name] = _part(value, name, start, which, rows)
        elif name in _AXES and isinstance(value, tuple):
            arguments[name] = tuple(_part(x, name, start, which, rows) for x in value)
        elif isinstance(value, Tensor):
            msg = f"its layers receive '{name}', which shared prefixes do not support"
            raise NotShared(msg)
        else:
            arguments[name] = value
    return arguments


def _part(x: Tensor, name: str, start: int, which: Tensor, rows: int) -> Tensor:
    examples, positions = _AXES[name]
    x = x.narrow(positions, start, x.shape[positions] - start)
    if examples is None or x.dim() < -examples or x.shape[examples] == 1:
        return x
    return x.index_select(examples, which).repeat_interleave(rows, dim=examples)
