"""How well captions fit their images by a model: log p(caption | image) - mean log p(caption | other images), in nats.

A caption of another image is no more probable for its image than for others, so its value is near 0 or below; the language
prior of the caption is in both terms (Shu et al., arXiv 2501.01346, 3.2.1, name mismatched captions as a cause).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from behavior.data_audit.finding import AuditedData
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.progress import display

if TYPE_CHECKING:
    from lvlm.model import Lvlm

PROMPT = "Describe the image."


def caption_fit(
    model: Lvlm,
    data: ConceptDataset,
    *,
    others: int = 4,
    prompt: str = PROMPT,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, float]:
    """Return for each caption how much more probable its own image makes it, in nats; for `audit` as ``caption_scores``.

    Parameters
    ----------
    model
        The model; one forward pass of ``others + 1`` prompts for each caption, in batches.
    data
        Data with captions (examples of kind ``caption`` with a reference description). Of several captions of one example the
        lowest value counts.
    others
        Number of other images, drawn at random for each caption; all of them if there are fewer.
    prompt
        Request after which the caption is the answer.
    batch_size
        Number of prompts per forward pass.
    seed
        Seed of the choice of other images.
    progress
        Whether to show a progress bar; None shows it on a terminal.

    Returns
    -------
    dict
        Id of the caption's example to the value.

    Raises
    ------
    DataError
        For data without captions, or with one image.
    ConfigError
        For numbers below 1, or an active decoding method.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.data_audit import caption_fit
    >>> from dataclasses import replace
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20).filter(lambda e: e.kind == "caption")
    >>> written = gs.answer(model, data).texts  # its own captions fit
    >>> captions = gs.ConceptDataset("captions", tuple(replace(e, answer=written[e.id]) for e in data))
    >>> all(value > 0 for value in caption_fit(model, captions).values())
    True
    """
    from lvlm.answer_keys import answer_tokens
    from lvlm.answer_scores import answer_log_probabilities

    if others < 1 or batch_size < 1:
        msg = f"others={others}, batch_size={batch_size}: both must be at least 1"
        raise ConfigError(msg)
    audited = AuditedData(data)
    images = {image: rows[0] for image, rows in audited.by_image.items() if len(rows[0].images) == 1}
    captions = [(e, text) for e, text in audited.captions if audited.image_of[e.id] in images]
    if not captions or len(images) < 2:
        msg = (
            "caption fit needs captions (examples of kind 'caption' with a reference description) of two or more images"
        )
        raise DataError(msg)
    chance = random.Random(seed)
    rows: list[tuple[int, Example, list[int]]] = []
    for number, (example, text) in enumerate(captions):
        own = audited.image_of[example.id]
        elsewhere = [image for image in images if image != own]
        for image in (own, *chance.sample(elsewhere, min(others, len(elsewhere)))):
            request = _request(example, images[image], prompt, f"{number}/{image}")
            rows.append((number, request, answer_tokens(model, request, text)))
    log_p: dict[int, list[float]] = {}
    with display(show=progress) as bar:
        task = bar.add_task("scoring captions", total=len(rows))
        values: dict[int, float] = {}
        for batch in model.batches([request for _, request, _ in rows], batch_size, in_order=False):
            result = answer_log_probabilities(model, batch, [rows[i][2] for i in batch.index]).tolist()
            values.update(zip(batch.index, result, strict=True))
            bar.advance(task, len(batch.index))
        for i, (number, _, _) in enumerate(rows):
            log_p.setdefault(number, []).append(values[i])
    fit: dict[str, float] = {}
    for number, (own, *other_values) in log_p.items():
        name = captions[number][0].id
        fit[name] = min(fit.get(name, float("inf")), own - sum(other_values) / len(other_values))
    return fit


def _request(example: Example, about: Example, prompt: str, name: str) -> Example:
    """Return the request for a description of another example's image."""
    return replace(
        example, id=name, image=about.image, question=prompt, answer="", aliases=(), objects=(), subject=None, labels={},
        prefix="", mentions=(), suffix="", system=None,
    )  # fmt: skip
