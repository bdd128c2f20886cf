"""A sequence of counterfactual pairs that says how they were made and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.text import format_count, format_reasons

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class PairSet(Sequence[CounterfactualPair]):
    """Counterfactual pairs of one kind, with how they were made and what was left out.

    Examples
    --------
    >>> import groundscope as gs
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "color", limit=2)
    >>> pairs
    PairSet(2 pairs of kind 'color', 1 image)
    >>> pairs[0].change
    'airplane: blue -> purple'
    """

    pairs: tuple[CounterfactualPair, ...]
    kind: str
    method: str = ""
    """Method of photographs; empty for other pairs."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of examples without a pair, by reason, among those that were tried before the limit was reached."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", MappingProxyType(dict(self.left_out)))

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[CounterfactualPair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> CounterfactualPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> CounterfactualPair | PairSet:
        if isinstance(index, slice):
            return PairSet(self.pairs[index], self.kind, self.method, self.left_out)
        return self.pairs[index]

    def __repr__(self) -> str:
        method = f" by '{self.method}'" if self.method else ""
        images = len({pair.group for pair in self.pairs})
        counts = f"{format_count(len(self), 'pair')} of kind '{self.kind}'{method}, {format_count(images, 'image')}"
        lines = [f"PairSet({counts})"]
        if self.left_out:
            lines.append(f"left out: {format_reasons(self.left_out, most=3)}")
        return "\n".join(lines)

    def frame(self) -> pd.DataFrame:
        """Return one row a pair: ids, question, both answers, kind, change, method, placebo, group."""
        import pandas as pd

        rows = [
            {
                "clean": p.clean.id, "corrupt": p.corrupt.id, "question": p.clean.question, "answer": p.clean.answer,
                "corrupt_answer": p.corrupt.answer, "kind": p.kind, "change": p.change, "method": p.method,
                "placebo": p.placebo, "group": p.group,
            }
            for p in self.pairs
        ]  # fmt: skip
        return pd.DataFrame(rows)
