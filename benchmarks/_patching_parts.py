"""Used by benchmarks/patching.py: a counter of tensor memory, and the plot of how cost grows with the model."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all storages that are allocated in the context and still alive.

    Attributes
    ----------
    current, peak
        Bytes now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it allocates."""
        out = func(*args, **(kwargs or {}))
        # An output that shares its storage with an input, such as a view of a weight, is no new memory.
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._counted:
            return
        self._counted.add(key)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.current -= size


def plot_growth(growth: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Plot cost in plain forward passes over layers, heads and image tokens, one panel each.

    Parameters
    ----------
    growth
        Axis label to (size, cost of `circuits.patch_heads`, cost of one forward pass per head).
    path
        Image file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(growth), figsize=(9, 3), sharey=True, layout="constrained")
    for panel, (name, rows) in zip(panels, growth.items(), strict=True):
        sizes, costs, loop_costs = zip(*rows, strict=True)
        panel.plot(sizes, loop_costs, "o-", color="0.55", label="one forward pass per head")
        panel.plot(sizes, costs, "o-", color="C0", label="circuits.patch_heads")
        panel.set(xlabel=name, yscale="log", xticks=sizes)
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        for x, y in zip(sizes, costs, strict=True):
            panel.annotate(f"{y:.1f}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    panels[0].set_ylabel("plain forward passes")
    panels[0].set_ylim(1, None)
    right = panels[0].get_xlim()[1]
    panels[0].annotate("one forward pass per head", (right, 50), ha="right", fontsize=8, color="0.45")
    panels[0].annotate("circuits.patch_heads", (right, 6), ha="right", fontsize=8, color="C0")
    figure.suptitle("Patching all heads at the last token of one pair, including both runs of the pair", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
