"""Examples of one modality: the text without its image, or the image without the text.

``text``
    The prompt of the example without an image, as the model writes it for a question without one (`concepts.NoImage`).
``image``
    The prompt of an empty question: the image's tokens and their markers, and what the template writes for every question:
    the first token, its own system prompt, names of roles, the start of the answer. No word of the example remains: its
    question, suffix, system prompt, prefix and answers are left out, also for encoders that read the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from activation_store.row_input import INPUTS, RowInput
from concepts.image_source import NoImage
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, ModelError, SiteError
from groundscope.core.text import nearest
from lvlm.encoding.encode import runs_without_image
from lvlm.model import Lvlm
from lvlm.sites import parse_component
from lvlm.token_selection import TokenSelection

_OF_IMAGE = ("image", "object")
_OF_TEXT = ("question", "prefix", "mention", "generated", "answer")


def select_modality(
    model: Lvlm, data: ConceptDataset, modality: RowInput, sites: Sequence[str], tokens: Sequence[str], generate: int
) -> ConceptDataset:
    """Return the examples to run: with both modalities, or with one alone.

    Raises
    ------
    ConfigError
        If the input is unknown, or an answer is to be generated without a question.
    ModelError
        For text alone, if the model does not run without an image.
    SiteError
        If a site or a token selection belongs to the other modality.
    """
    if modality not in INPUTS:
        msg = f"unknown input '{modality}'; choose from {', '.join(INPUTS)}{nearest(str(modality), INPUTS)}"
        raise ConfigError(msg)
    if modality == "both":
        return data
    if modality == "image" and generate:
        msg = f"generate={generate} with input='image': without a question there is no answer; set generate=0"
        raise ConfigError(msg)
    excluded = _OF_IMAGE if modality == "text" else _OF_TEXT
    wrong = next((t for t in tokens if TokenSelection.parse(str(t)).role in excluded), None)
    if wrong is not None:
        msg = f"input='{modality}': the prompt has no tokens of '{wrong}'; leave out this token selection, or set input='both'"
        raise SiteError(msg)
    if modality == "image":
        empty = {"question": "", "suffix": "", "prefix": "", "system": None, "mentions": ()}
        return replace(data, examples=tuple(replace(e, **empty) for e in data))
    place = next((s for s in sites if parse_component(str(s))[0] != "decoder"), None)
    if place is not None:
        msg = f"input='text': '{place}' reads images, which input='text' leaves out; use sites of the decoder"
        raise SiteError(msg)
    if not runs_without_image(model) or any(model.head_site(layer).cross for layer in range(model.n_layers)):
        msg = (
            f"input='text': {model.name} ({model.spec.model_type}) does not run all its layers without an image, so the text "
            "alone cannot be traced; use another model"
        )
        raise ModelError(msg)
    return replace(data, examples=tuple(replace(e, image=NoImage(), further_images=()) for e in data))
