"""Write the illustrations of the report: the stages have the model and the images, the report has only the run folder.

A problem here, such as a model without attention weights, is written with the illustrations and does not stop the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from concepts.schema import ConceptDataset, Example
from experiments.records import TOP_HEADS, read_record
from experiments.results.illustrations import AttentionMap, Illustration, copy_image, write_illustrations
from experiments.results.selection import detailed_diagnoses, detailed_heads, prior_errors, typical_error
from experiments.run.context import Context
from groundscope.core.errors import GroundscopeError
from lvlm.sites import Head

if TYPE_CHECKING:
    from circuits import HeadScores
    from diagnosis import Diagnoses
    from mitigation import SteeringVector

ATTENTION_HEADS = 4
"""Heads whose attention is shown for the error by prior."""


def illustrate_heads(context: Context, folder: Path, scores: Mapping[str, HeadScores], top: Sequence[str]) -> None:
    """Write the attention of the heads that the report shows in detail, on the examples with the largest effects."""

    def make() -> list[Illustration]:
        examples = {e.id: e for e in context.discovery}
        details = detailed_heads(scores, top, examples)
        chosen = [examples[name] for name in dict.fromkeys(name for d in details for name in d.examples)]
        attention = _attention(context, chosen, [d.head for d in details])
        return [_illustration(e, attention=attention[e.id]) for e in chosen]

    _write(folder, make)


def illustrate_prior_error(context: Context, folder: Path, vector: SteeringVector | None, *, twin: bool) -> None:
    """Write the error by prior that the report follows through the model: image, answers and attention of the top heads.

    Parameters
    ----------
    context, folder
        The run, and the folder of the stage.
    vector
        The correction under which the question is asked again; None for no correction.
    twin
        Whether to ask the twin too.
    """

    def make() -> list[Illustration]:
        frame = context.store.frame()
        examples = {e.id: e for e in context.discovery}
        ids = frame["id"].tolist()
        example = typical_error([examples[ids[row]] for row in prior_errors(frame, examples)])
        if example is None:
            return []
        answers = {}
        if vector is not None:
            with vector.applied(context.model):
                answers["after"] = _answer(context.model, example)
        if twin and context.twin is not None:
            answers["twin"] = _answer(context.twin, example)
        top = read_record(context.folder.path / "circuits" / "top.json", TOP_HEADS)["heads"]
        attention = _attention(context, [example], [Head.parse(h) for h in top][:ATTENTION_HEADS])
        return [_illustration(example, answers, attention[example.id])]

    _write(folder, make)


def illustrate_diagnoses(context: Context, folder: Path, diagnoses: Diagnoses) -> None:
    """Write copies of the images of the wrong answers that the report shows in detail."""

    def make() -> list[Illustration]:
        examples = {e.id: e for e in context.discovery}
        chosen = detailed_diagnoses(diagnoses, context.config.diagnose.shown)
        return [_illustration(examples[d.example["id"]]) for d in chosen if d.example["id"] in examples]

    _write(folder, make)


def _write(folder: Path, make: Callable[[], list[Illustration]]) -> None:
    try:
        write_illustrations(folder, make())
    except GroundscopeError as error:
        write_illustrations(folder, [], str(error))


def _illustration(
    example: Example, answers: Mapping[str, str] | None = None, attention: Mapping[str, AttentionMap] | None = None
) -> Illustration:
    image = example.image.load()
    return Illustration(example.id, copy_image(image), image.size, answers or {}, attention or {})


def _answer(model: object, example: Example) -> str:
    from behavior import answer

    return str(answer(model, ConceptDataset("one", (example,)), progress=False).answers[0].given)  # pyright: ignore[reportArgumentType]


def _attention(
    context: Context, examples: Sequence[Example], heads: Sequence[Head]
) -> dict[str, dict[str, AttentionMap]]:
    """Return attention maps by id of the example and head."""
    from circuits import attention_to_image

    if not examples or not heads:
        return {e.id: {} for e in examples}
    attention = attention_to_image(context.model, examples, heads)
    return {
        example.id: {
            str(head): AttentionMap(attention.maps[i, k].reshape(attention.grid), float(attention.image_mass[i, k]))
            for k, head in enumerate(heads)
        }
        for i, example in enumerate(examples)
    }
