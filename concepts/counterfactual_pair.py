"""A counterfactual pair: two examples that differ in one stated property."""

from __future__ import annotations

from dataclasses import dataclass

from concepts.schema import Example
from groundscope.core.errors import DataError


@dataclass(frozen=True)
class CounterfactualPair:
    """Two examples with the same question that differ in one stated thing, made by `concepts.counterfactuals.pairs`.

    The image of `corrupt` is that of `clean` with one change, and its true answer is another one; after the changes
    ``blank``, ``blur``, ``noise`` and ``mask`` the image shows no evidence for any answer.

    Raises
    ------
    DataError
        If the two examples have different prefixes.

    Examples
    --------
    >>> import groundscope as gs
    >>> pair = gs.counterfactuals.pairs(gs.scenes.dataset(10), "object", limit=1)[0]
    >>> pair.clean.question == pair.corrupt.question, pair.clean.answer, pair.corrupt.answer, pair.kind
    (True, 'yes', 'no', 'object')
    """

    clean: Example
    corrupt: Example
    kind: str
    """Kind of the change, an entry of `concepts.counterfactuals.KINDS`."""
    change: str
    """The change in words, such as ``apple: green -> red``."""
    method: str = ""
    """How a photograph was changed: ``swap``, ``mirror``, ``recolor``, ``inpaint``; empty for scenes, which are drawn again."""
    placebo: bool = False
    """Whether the true answer is the same in both: a control for what the change itself does."""

    def __post_init__(self) -> None:
        if self.clean.prefix != self.corrupt.prefix:
            msg = (
                f"pair '{self.clean.id}': clean has the prefix '{self.clean.prefix}', corrupt '{self.corrupt.prefix}'; give "
                "both examples the same prefix"
            )
            raise DataError(msg)

    def __repr__(self) -> str:
        answers = f"'{self.clean.answer}' -> '{self.corrupt.answer}'"
        method = f", {self.method}" if self.method else ""
        after = f" after '{self.clean.prefix.strip()}'" if self.clean.prefix else ""
        return f"CounterfactualPair({self.kind}{method}: {self.change}; '{self.clean.question}' {answers}{after})"

    def _repr_html_(self) -> str:
        from concepts.display import pair_html

        return pair_html(self)

    @property
    def group(self) -> str:
        """The image or scene of the clean example."""
        return self.clean.group
