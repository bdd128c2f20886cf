"""Control of methods that raise attention to the image: the same edit at random text tokens."""

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
from lvlm.decoding.row_layout import RowLayout
from mitigation.training_free.attention import AttentionMethod
from mitigation.training_free.controls.method_control import MethodControl
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.middle_layers import MiddleLayers
from mitigation.training_free.methods.pai import PAI
from mitigation.training_free.methods.vaf import VAF
from mitigation.training_free.methods.var import VAR
from mitigation.training_free.seeds import generator_of

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class RandomText(MethodControl):
    """Control: a method's edit of attention at as many random text tokens of the prompt as there are image tokens.

    If this control gains as much as a method that raises attention to the image, the gain is not due to the image. In a prompt
    with fewer text tokens than image tokens, all text tokens are edited. The tokens are drawn by the seed and the numbers of text
    and image tokens, so they do not depend on the batch. Everything else is the method's: layers, queries, factors, its contrast,
    and those of the other tokens before the image that VAF suppresses.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_text_tokens import RandomText
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with RandomText().applied(model):
    ...     answers = gs.answer(model, data)
    >>> RandomText().name, len(answers)
    ('random text tokens in PAI', 6)
    """

    label: ClassVar[str] = "random text tokens"
    methods: ClassVar[Mapping[str, type[TrainingFree]]] = MappingProxyType(
        {"pai": PAI, "vaf": VAF, "var": VAR, "middle_layers": MiddleLayers}
    )
    default_of: ClassVar[tuple[str, ...]] = tuple(methods)

    of: TrainingFree = field(default_factory=PAI)

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        _ = self._attention_method()

    def _attention_method(self) -> AttentionMethod:
        of = self.of
        if not isinstance(of, AttentionMethod) or type(of)._enter is not AttentionMethod._enter:
            msg = f"{self.label}: {of.name} does not edit attention to image tokens; choose from {', '.join(self.methods)}"
            raise ConfigError(msg)
        return of

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        of = self._attention_method()
        return of._enter_edit(model, stack, at_random_text(of.edited, self.seed))


def at_random_text(editor: Editor, seed: int) -> Editor:
    """Return an editor for which random text tokens are the image."""

    def edit(rows: AttentionRows) -> AttentionRows | None:
        edited = editor(replace(rows, layout=text_layout(rows.layout, seed)))
        return None if edited is None else replace(edited, layout=rows.layout)

    return edit


@dataclass(frozen=True, eq=False)
class _TextLayout(RowLayout):
    """A layout with other image tokens; the other tokens before and after the image stay."""

    original: RowLayout | None = None

    @property
    def before_image(self) -> Tensor:
        return super().before_image if self.original is None else self.original.before_image & ~self.image

    @property
    def after_image(self) -> Tensor:
        return super().after_image if self.original is None else self.original.after_image


def text_layout(layout: RowLayout, seed: int) -> RowLayout:
    """Return a layout whose image tokens are random text tokens of the prompt, as many as there are image tokens.

    Examples
    --------
    >>> import torch
    >>> from lvlm.decoding.row_layout import RowLayout
    >>> from mitigation.training_free.controls.random_text_tokens import text_layout
    >>> image = torch.tensor([[False, True, True, False, False, False]])
    >>> chosen = text_layout(RowLayout(torch.tensor([0]), image, torch.ones_like(image), prompt=5), 0).image
    >>> int(chosen.sum()), bool((chosen & image).any()), bool(chosen[0, 5])
    (2, False, False)
    """
    columns = torch.arange(layout.valid.shape[1], device=layout.valid.device)
    text = layout.valid & ~layout.image & (columns < layout.prompt)
    chosen = torch.zeros_like(text)
    for row, (tokens, count) in enumerate(zip(text, layout.image.sum(1).tolist(), strict=True)):
        places = tokens.nonzero().flatten()
        rng = generator_of(seed, "text tokens", len(places), count)
        chosen_places = rng.choice(len(places), min(count, len(places)), replace=False)
        chosen[row, places[torch.as_tensor(chosen_places, dtype=torch.long, device=places.device)]] = True
    return _TextLayout(layout.branch, chosen, layout.valid, layout.prompt, layout.marks, layout)
