"""AD-HH: zero the attention of hallucination heads to text when it is large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from groundscope.core.errors import ConfigError
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.sites import parse_heads
from mitigation.training_free.attention import AttentionMethod
from mitigation.training_free.method import Category, check_parameters, check_range
from mitigation.training_free.published_sizes import scaled_count

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from mitigation.method_data import DerivationData


@dataclass(frozen=True)
class ADHH(AttentionMethod):
    """Adaptive deactivation of hallucination heads: where such a head attends mostly to text, its attention to text is zeroed.

    If the weights of the last query to the text after the image (the question and the answer so far) add to at least
    `threshold` in a head of `heads`, these weights become 0; the others are not renormalized. Yang et al. 2025 (ICLR), release
    read; its heads are the 20 of 1,024 that its attribution ranks highest. **Here the heads are those that patching ranks
    highest** (`DerivationData.heads`), as many as 20 of 1,024 correspond to, at least one.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.ad_hh import ADHH
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> method = ADHH.derive(gs.DerivationData(model, None, data, heads=["L3.H1", "L2.H0"]))
    >>> method.heads
    ('L3.H1',)
    >>> with method.applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "AD-HH"
    category: ClassVar[Category] = "heads"
    source: ClassVar[str] = "ICLR 2025, adaptive deactivation of hallucination heads"
    needs: ClassVar[tuple[str, ...]] = ("heads",)

    heads: tuple[str, ...] = ()
    """Heads that are edited, such as ``L3.H1``."""
    threshold: float = 0.4
    """Smallest sum of weights to text that is zeroed; in [0, 1]."""

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, 1)
        parse_heads(self.heads)

    @classmethod
    def derive(cls, data: DerivationData, **parameters: Any) -> Self:
        """Return the method with the first of the data's heads, or with ``heads``.

        Raises
        ------
        ConfigError
            For an unknown parameter, and without heads.
        """
        check_parameters(cls, parameters)
        count = scaled_count(20, data.model.n_layers * data.model.n_heads, 1024)
        heads = parameters.pop("heads", None) or tuple(str(head) for head in data.heads[:count])
        if not heads:
            msg = f"{cls.label} needs heads to deactivate; pass data with the heads that patching ranks highest"
            raise ConfigError(msg)
        return cls(heads=tuple(heads), **parameters)

    @property
    def neutral(self) -> bool:
        """Whether the parameters leave attention unchanged."""
        return not self.heads

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks of the heads."""
        return tuple(sorted({head.layer for head in parse_heads(self.heads)}))

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters."""
        return self.parameters

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        high = max((head.head for head in parse_heads(self.heads)), default=0)
        if high >= model.n_heads:
            msg = f"{self.label}: head {high}, but layers of {model.name} have heads 0-{model.n_heads - 1}"
            raise ConfigError(msg)

    def edited(self, rows: AttentionRows) -> AttentionRows:
        """Return attention without weights to text where they are large."""
        text = rows.keys(rows.layout.after_image & rows.layout.image.any(1, keepdim=True))
        chosen = torch.zeros(rows.weights.shape[1], dtype=torch.bool, device=text.device)
        chosen[[head.head for head in parse_heads(self.heads) if head.layer == rows.layer]] = True
        large = (rows.weights * text).sum(-1, keepdim=True) >= self.threshold
        return rows.with_weights(rows.weights.masked_fill(text & large & chosen[:, None, None], 0))
