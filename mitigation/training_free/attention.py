"""Methods that edit attention to image tokens in some layers, and the attention that single tokens pay to the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lvlm.decoding.attention_edits import Editor, Queries, check_attention_edits, edit_attention, read_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.encoding.continued_inputs import append_tokens
from mitigation.training_free.lens import check_blocks, check_depth
from mitigation.training_free.method import Category, TrainingFree, check_image_tokens

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class AttentionMethod(TrainingFree):
    """A method that edits attention; subclasses override `edited` and, for a part of the layers, `edited_layers`.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.attention import AttentionMethod
    >>> AttentionMethod().edited_layers(gs.load_lvlm("tiny"))
    (0, 1, 2, 3, 4, 5)
    """

    label: ClassVar[str] = "attention"
    category: ClassVar[Category] = "attention"
    queries: ClassVar[Queries] = "last"

    def edited(self, rows: AttentionRows) -> AttentionRows | None:
        """Return changed attention of one layer."""
        return None

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        return tuple(range(model.n_layers))

    @property
    def neutral(self) -> bool:
        """Whether the parameters leave attention unchanged."""
        return False

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the blocks that are edited."""
        return {**self.parameters, "layers": self.edited_layers(model)}

    def _check(self, model: Lvlm) -> None:
        check_attention_method(self.label, model)
        check_depth(self.edited_layers(model), model.n_layers, self.label, model)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return self._enter_edit(model, stack, self.edited)

    def _enter_edit(self, model: Lvlm, stack: ExitStack, editor: Editor) -> Decoder | None:
        """Enter the method with `editor` in place of `edited`; controls pass an editor that acts elsewhere."""
        if not self.neutral:
            layers = self.edited_layers(model)
            stack.enter_context(edit_attention(model, editor, layers=layers, queries=self.queries, registered=True))
        return None


def check_attention_method(label: str, model: Lvlm) -> None:
    """Raise `ModelError` for a family without image tokens in its decoder, or whose attention cannot be edited."""
    check_image_tokens(model, label)
    check_attention_edits(model)


def check_layers(layers: tuple[int, ...] | None) -> None:
    """Raise `ConfigError` if the field `layers` is neither None nor a tuple of different whole numbers from 0."""
    check_blocks(layers)


def image_attention(model: Lvlm, batch: Batch, answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the attention to the image at the query that produced each token of an answer.

    A small sum at the first token of an object's name suggests that the model did not look at the image when it named the
    object: with the released code of arXiv 2411.16724, which calls it the visual attention ratio, its sum over heads of middle
    layers is a detector of objects that are not in the image.

    Parameters
    ----------
    model
        The model, of a family with image tokens in its decoder.
    batch
        The prompts.
    answers
        Tokens of the answer to each prompt; at least one each.

    Returns
    -------
    list of Tensor
        For each answer of n tokens, sums of attention weights over image tokens ``[layers, heads, n]``; zeros for layers without
        self-attention.

    Raises
    ------
    ModelError
        If attention of the family cannot be read.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.attention import image_attention
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> batch = next(model.batches(data.examples[:2], 2))
    >>> [x.shape for x in image_attention(model, batch, [[5], [5, 6]])]
    [torch.Size([6, 8, 1]), torch.Size([6, 8, 2])]
    """
    check_attention_method("the attention to the image", model)
    sums = []
    for row, answer in enumerate(answers):
        inputs = model.collate([batch.encodings[row]])
        length = inputs["input_ids"].shape[1]
        whole = append_tokens(model, inputs, [list(answer)])
        by_layer: dict[int, Tensor] = {}

        def store(rows: AttentionRows, by_layer: dict[int, Tensor] = by_layer) -> None:
            by_layer[rows.layer] = (rows.weights * rows.image).sum(-1)[0]

        with model.reading_answers(length), read_attention(model, store):
            model.logits(whole)
        first = next(iter(by_layer.values()))
        layers = [by_layer.get(i, torch.zeros_like(first)) for i in range(model.n_layers)]
        sums.append(torch.stack([x.to(first.device) for x in layers])[..., : len(answer)])
    return sums
