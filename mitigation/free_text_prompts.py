"""Prompts that measure how much a correction changes free text: captions, and plain text without an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from behavior import BehaviorResult, Cost, answer
from circuits import intervened
from concepts.schema import ConceptDataset, Example
from mitigation.model_outputs import ModelOutputs

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from mitigation.steering.vector import SteeringVector

CAPTIONS = 60
"""Largest number of images that are described to measure a cost."""
TEXTS = 24
"""Largest number of plain texts that are continued."""
CAPTION_TOKENS = 40
TEXT_TOKENS = 12


def caption_prompts(data: ConceptDataset, limit: int = CAPTIONS) -> ConceptDataset:
    """Return prompts for descriptions of at most `limit` images: the data's own, then the same prompt for other images.

    The images are spread over the data. Prompts for data without caption prompts have no annotation, because objects that
    happen to be annotated are not all objects: of their captions only the length is measured.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.free_text_prompts import caption_prompts
    >>> prompts = caption_prompts(gs.scenes.dataset(20), limit=5)
    >>> len(prompts), {e.question for e in prompts}
    (5, {'Describe the image.'})
    """
    own = [e for e in data if e.kind == "caption"]
    question = own[0].question if own else "Describe the image."
    described = {e.group for e in own}
    first_of: dict[str, Example] = {}
    for example in data:
        first_of.setdefault(example.group, example)
    others = [e for group, e in first_of.items() if group not in described and e.images]
    count = max(0, limit - len(own))
    chosen = others[:: max(1, len(others) // max(count, 1))][:count]
    added = [
        Example(
            id=f"{e.group}/description", image=e.image, question=question, answer="", candidates=(), level="object",
            kind="caption", split="caption", group=e.group, objects=e.objects if own else (),
        )
        for e in chosen
    ]  # fmt: skip
    return ConceptDataset(f"captions of {data.name}", tuple(own[:limit] + added), data.provenance)


@dataclass(frozen=True)
class PlainText:
    """A text without an image, continued by the model without correction."""

    tokens: torch.Tensor
    """``[1, positions]``."""
    start: int
    """First position of the continuation."""


def plain_texts(model: Lvlm, data: ConceptDataset, limit: int = TEXTS) -> list[PlainText] | None:
    """Return prompts of questions without an image, each continued greedily; None for a model that cannot read them.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.free_text_prompts import plain_texts
    >>> texts = plain_texts(gs.load_lvlm("tiny"), gs.scenes.dataset(10), limit=2)
    >>> len(texts), texts[0].start < texts[0].tokens.shape[1]
    (2, True)
    """
    if model.encoder_decoder or not model.image_encoding.runs_without_image:
        return None
    questions = list(dict.fromkeys(e.question for e in data))
    chosen = questions[:: max(1, len(questions) // limit)][:limit]
    tokenizer, texts = model.processor.tokenizer, []
    for question in chosen:
        text = model.prompt(question, images=0)
        special = model.spec.special_tokens and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        ids = torch.tensor([tokenizer(text, add_special_tokens=special)["input_ids"]], device=model.device)
        if ids.shape[1]:
            texts.append(PlainText(_continued(model, ids), ids.shape[1]))
    return texts


@torch.no_grad()
def _continued(model: Lvlm, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(TEXT_TOKENS):
        logits = model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@torch.no_grad()
def predict_text(model: Lvlm, texts: Sequence[PlainText]) -> tuple[np.ndarray, ...]:
    """Return for each text the token with the largest logit at each position of its continuation.

    Changes that are active act on the continuation as they do while it is generated.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.free_text_prompts import plain_texts, predict_text
    >>> model = gs.load_lvlm("tiny")
    >>> texts = plain_texts(model, gs.scenes.dataset(10), limit=1)
    >>> (predictions,) = predict_text(model, texts)
    >>> bool((predictions == texts[0].tokens[0, texts[0].start :].numpy()).all())
    True
    """
    predictions = []
    for text in texts:
        keep = text.tokens.shape[1] - text.start + 1
        inputs = {"input_ids": text.tokens, "attention_mask": torch.ones_like(text.tokens)}
        with model.reading_answers(text.start):
            logits = model.forward(inputs, keep=keep)
        predictions.append(logits[0, :-1].argmax(-1).cpu().numpy())
    return tuple(predictions)


@dataclass(frozen=True, eq=False)
class FreeTextPrompts:
    """Prompts that measure how much a correction changes free text.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.free_text_prompts import FreeTextPrompts
    >>> model = gs.load_lvlm("tiny")
    >>> prompts = FreeTextPrompts.of(model, gs.scenes.dataset(10), captions=2, texts=1)
    >>> len(prompts.captions), len(prompts.texts)
    (2, 1)
    """

    captions: ConceptDataset
    texts: list[PlainText] | None

    @classmethod
    def of(cls, model: Lvlm, data: ConceptDataset, *, captions: int = CAPTIONS, texts: int = TEXTS) -> FreeTextPrompts:
        """Return the prompts for some data; see `caption_prompts` and `plain_texts`."""
        return cls(caption_prompts(data, captions), plain_texts(model, data, texts))

    def outputs(
        self, model: Lvlm, vector: SteeringVector | None, *, batch_size: int = 64, progress: bool | None = None
    ) -> ModelOutputs:
        """Describe the images and continue the texts under a vector; None is the model without correction."""
        with intervened(model, [] if vector is None else vector.interventions()):
            plain = None if self.texts is None else predict_text(model, self.texts)
            if not len(self.captions):
                return ModelOutputs(self.captions, BehaviorResult((), Cost(None, None, 0)), plain)
            answers = answer(
                model, self.captions, batch_size=batch_size, max_new_tokens=CAPTION_TOKENS, progress=progress
            )
        return ModelOutputs(self.captions, answers, plain)
