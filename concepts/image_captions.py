"""One true description of each image: a reference caption, or the exact description of an icon scene."""

from __future__ import annotations

from dataclasses import replace

from concepts.scenes import questions
from concepts.scenes.scene import Scene
from concepts.schema import ConceptDataset, Example

CAPTION = "caption"
"""Kind of the examples that ask for a description; the true answer has one reference caption per line."""


def caption_images(data: ConceptDataset) -> ConceptDataset:
    """Return one example with a true description for each image of a dataset: texts to compare the images with.

    The description is the first reference caption of an example of kind ``caption`` about the image, or for icon scenes that of
    `concepts.scenes.questions.caption`. Images without either are left out. The examples keep the group of their image and its
    labels of present objects; other labels belong to questions.

    Examples
    --------
    >>> import groundscope as gs
    >>> from concepts import caption_images
    >>> data = gs.scenes.dataset(10)
    >>> captions = caption_images(data)
    >>> captions[0].answer, len(captions) == len({e.image.identity for e in data})
    ('a blue airplane, a yellow chair and a red banana.', True)
    """
    references: dict[str, Example] = {}
    for example in data:
        if example.kind == CAPTION and example.answer:
            references.setdefault(example.image.identity, example)
    captions: dict[str, Example] = {}
    for example in data:
        if len(example.images) != 1 or example.image.identity in captions:
            continue
        reference = references.get(example.image.identity)
        if reference is not None:
            question, answer = reference.question, reference.answer.splitlines()[0]
        elif isinstance(example.image, Scene):
            described = questions.caption(example.image)
            question, answer = described.text, described.answer
        else:
            continue
        captions[example.image.identity] = replace(
            example,
            id=f"{CAPTION}/{example.id}",
            question=question,
            answer=answer,
            candidates=(),
            kind=CAPTION,
            level="object",
            split=CAPTION,
            subject=None,
            prior_answer=None,
            prefix="",
            mentions=(),
            aliases=(),
            suffix="",
            labels={k: v for k, v in example.labels.items() if k.startswith("object:") and k != "object:named"},
        )
    return replace(data, name=f"captions of {data.name}", examples=tuple(captions.values()))
