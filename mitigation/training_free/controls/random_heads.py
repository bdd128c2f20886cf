"""Control of methods that act on some heads: as many random heads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError
from lvlm.decoding.attention_edits import Editor
from lvlm.decoding.attention_rows import AttentionRows
from mitigation.training_free.controls.method_control import MethodControl
from mitigation.training_free.controls.random_places import other_heads
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.ad_hh import ADHH
from mitigation.training_free.methods.spin import SPIN, kept_count
from mitigation.training_free.seeds import generator_of

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class RandomHeads(MethodControl):
    """Control: a method at as many random heads as it acts on.

    AD-HH acts on heads that are not among its own. SPIN scales as many heads of each layer; they are drawn for each token by its
    number, whatever they attend to, and are the same for all questions.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_heads import RandomHeads
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with RandomHeads().applied(model):
    ...     answers = gs.answer(model, data)
    >>> RandomHeads().name, len(answers)
    ('random heads in SPIN', 6)
    """

    label: ClassVar[str] = "random heads"
    methods: ClassVar[Mapping[str, type[TrainingFree]]] = MappingProxyType({"spin": SPIN, "ad_hh": ADHH})
    default_of: ClassVar[tuple[str, ...]] = tuple(methods)

    of: TrainingFree = field(default_factory=SPIN)

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        if not isinstance(self.of, ADHH | SPIN):
            msg = f"{self.label}: {self.of.name} chooses no heads; choose from {', '.join(self.methods)}"
            raise ConfigError(msg)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        if isinstance(self.of, ADHH):
            heads = other_heads(model, self.of.heads, self.seed)
            return replace(self.of, heads=tuple(str(head) for head in heads))._enter(model, stack)
        return self.of._enter_edit(model, stack, _scaled(self.of, self.seed)) if isinstance(self.of, SPIN) else None


def _scaled(method: SPIN, seed: int) -> Editor:
    def edit(rows: AttentionRows) -> AttentionRows:
        stays = random_stays(rows, method.keep, seed) | ~rows.image.any(-1)
        return rows.with_outputs(torch.where(stays[..., None], rows.outputs, rows.outputs * method.factor))

    return edit


def random_stays(rows: AttentionRows, keep: float, seed: int) -> Tensor:
    """Return which heads stay, bool ``[1, heads, queries]``: the share `keep`, drawn by layer and number of the token."""
    heads, queries = rows.scores.shape[1:3]
    last = rows.layout.prompt - 1 - (rows.scores.shape[3] - queries)  # the query of the prompt's last token
    stays = torch.zeros(1, heads, queries, dtype=torch.bool, device=rows.scores.device)
    for query in range(queries):
        rng = generator_of(seed, "heads", rows.layer, query - last)
        chosen_heads = rng.choice(heads, kept_count(keep, heads), replace=False)
        stays[0, torch.as_tensor(chosen_heads, dtype=torch.long, device=stays.device), query] = True
    return stays
