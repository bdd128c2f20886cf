"""The table row of an example: its fields, the positions of its tokens and objects, and the model's answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from activation_store.format.schema import runs
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from lvlm.answer_keys import answer_key
from lvlm.finite_logits import check_finite
from lvlm.token_selection import SINGLE, TokenSelection

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lvlm.model import Encoding, Lvlm
    from lvlm.token_map import TokenMap


def build_row(model: Lvlm, encoding: Encoding, logits: Tensor | None, concepts: Sequence[str]) -> dict[str, Any]:
    """Return the table row of an example, without its spans and image digest.

    Parameters
    ----------
    model
        The model under study, whose tokenizer distinguishes the answers.
    encoding
        The example, with its prompt's tokens.
    logits
        ``[V]`` after the prompt's last token; None if answers are not recorded.
    concepts
        Names of the label columns; an undefined label is None.

    Raises
    ------
    ModelError
        If the logits are not finite.
    """
    e = encoding.example
    subject = e.named_object()
    model_answer, margin = "", None
    if logits is not None and has_answers(e):
        check_finite(logits.logsumexp(-1)[None], [f"example '{e.id}'"], model.name)
        key = answer_key(model, e)
        model_answer = key.candidates[int(key.scores(logits).argmax())]
        margin = float(key.margin(logits, e.answer))
    places = [(o, o.box) for o in e.objects if o.box is not None]
    return {
        "id": e.id,
        "group": e.group,
        "question": e.question,
        "answer": e.answer,
        "split": e.split,
        "kind": e.kind,
        "level": e.level or "",
        "subject": subject.noun if subject else "",
        "prior_answer": e.prior_answer or "",
        "model_answer": model_answer,
        "margin": margin,
        "correct": float(model_answer == e.answer) if model_answer else None,
        "n_tokens": encoding.tokens.length,
        "boxes": [[float(side) for side in (box.x0, box.y0, box.x1, box.y1)] for _, box in places],
        "box_ids": [o.id for o, _ in places],
        "box_nouns": [o.noun for o, _ in places],
        **{concept: e.labels.get(concept) for concept in concepts},
    }


def build_spans(tokens: TokenMap, roles: Iterable[str]) -> dict[str, list[list[int]]]:
    """Return the columns ``span:<role>`` of an example: the runs of its decoder positions for each role.

    Raises
    ------
    SiteError
        If the decoder does not have a role.
    """
    selections = {role: TokenSelection(role, None if role in SINGLE else "all") for role in roles}
    return {f"span:{role}": runs(tokens.positions(selection)) for role, selection in selections.items()}


def picture_digest(image: Image.Image) -> str:
    """Return the SHA-256 of an image, over the bytes that `activation_store.format.schema` defines."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}\0".encode() + rgb.tobytes()).hexdigest()


def has_answers(example: Example) -> bool:
    """Whether an example has at least two candidate answers."""
    return len(example.candidates) > 1


def check_answers(model: Lvlm, data: ConceptDataset) -> None:
    """Raise `DataError`, which names the example, if answers have the same first token."""
    for example in data:
        if has_answers(example):
            try:
                answer_key(model, example)
            except DataError as error:
                msg = f"{error}; set answers=False to trace without the model's own answers"
                raise DataError(msg) from error
