"""What benchmarks/patching.py counts memory with, and how it draws growth."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        # What an operation was given is no new memory when it gives it back, as a view of a weight is.
        input_storages = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in input_storages:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def draw(grown: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Draw how cost grows: one small panel for each way of growing, cost in plain forwards of that model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(grown), figsize=(9, 3), sharey=True, layout="constrained")
    for panel, (name, rows) in zip(panels, grown.items(), strict=True):
        sizes, ours, loop = zip(*rows, strict=True)
        panel.plot(sizes, loop, "o-", color="0.55", label="one forward a head")
        panel.plot(sizes, ours, "o-", color="C0", label="circuits.patch_heads")
        panel.set(xlabel=name, yscale="log", xticks=sizes)
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        for x, y in zip(sizes, ours, strict=True):
            panel.annotate(f"{y:.1f}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    panels[0].set_ylabel("plain forwards")
    panels[0].set_ylim(1, None)
    panels[0].annotate("one forward a head", (panels[0].get_xlim()[1], 50), ha="right", fontsize=8, color="0.45")
    panels[0].annotate("circuits.patch_heads", (panels[0].get_xlim()[1], 6), ha="right", fontsize=8, color="C0")
    figure.suptitle("All heads at the last token of one pair, its own two runs included", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
