"""Split an answer's log-odds by source; this answers section H.2 of Shu et al. (arXiv 2501.01346).

Prompt, image, or the language model's own knowledge: `split` names the two forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, cast, overload

from circuits.input_attribution.matched_texts import matched_prefixes, matched_questions
from circuits.input_attribution.results import Sources
from circuits.input_attribution.shapley_split import split_shapley
from circuits.input_attribution.telescoping import BLANKS, NEUTRAL_QUESTIONS, split_by_completion
from circuits.patching.activation import check_evaluating
from concepts.counterfactuals.image_edits import UNIFORM
from concepts.image_source import ImageSource
from concepts.schema import Example, require_one_image
from groundscope.core.errors import ConfigError, DataError, PatchError
from groundscope.core.text import nearest
from lvlm.answer_keys import answer_key
from lvlm.model import Lvlm

if TYPE_CHECKING:
    from circuits.input_attribution.shapley_results import ShapleySources

METHODS = ("telescoping", "shapley")
BLANK_NAMES = ("blank", *UNIFORM)
"""Names of blank images: the mean color of the image, and uniform ones."""
_MATCHED = ("question", "prefix")


class ShapleyOptions(TypedDict, total=False):
    """Options of ``method="shapley"`` only; see `circuits.input_attribution.shapley_split.split_shapley`."""

    image: Literal["whole", "objects"]
    prompt: Literal["whole", "words", "prefix"]
    neutral_prefixes: Sequence[str] | Mapping[str, Sequence[str]] | None
    orders: int


@overload
def split(
    model: Lvlm,
    examples: Sequence[Example],
    *,
    method: Literal["telescoping"] = "telescoping",
    of: Literal["said", "true"] = "true",
    matched: Literal["question", "prefix"] = "question",
    matched_texts: Mapping[str, Sequence[str]] | None = None,
    neutral_images: Sequence[str | ImageSource] | None = None,
    neutral_questions: Sequence[str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> Sources: ...


@overload
def split(
    model: Lvlm,
    examples: Sequence[Example],
    *,
    method: Literal["shapley"],
    of: Literal["said", "true"] = "true",
    neutral_images: Sequence[str | ImageSource] | None = None,
    neutral_questions: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
    **options: Unpack[ShapleyOptions],
) -> ShapleySources: ...


def split(
    model: Lvlm,
    examples: Sequence[Example],
    *,
    method: Literal["telescoping", "shapley"] = "telescoping",
    of: Literal["said", "true"] = "true",
    matched: Literal["question", "prefix"] = "question",
    matched_texts: Mapping[str, Sequence[str]] | None = None,
    neutral_images: Sequence[str | ImageSource] | None = None,
    neutral_questions: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
    **options: Unpack[ShapleyOptions],
) -> Sources | ShapleySources:
    """Split the log-odds of each answer by source: the default shares are lean, form, knowledge and image.

    With ``LO = log p(a) - log p(b)`` of two answers, each step completes the input and gets the change that it makes:

    =========== ======================================================================================================
    lean        LO(blank image, neutral question)
    form        LO(blank image, the question about other nouns, mean) - lean
    knowledge   LO(blank image, the question) - LO(blank image, the question about other nouns, mean)
    image       LO(image, the question) - LO(blank image, the question)
    =========== ======================================================================================================

    They sum to LO(image, the question). Log-odds are averaged, never probabilities. Whatever the image and the nouns do only
    together is part of the image's share. ``method="shapley"`` divides it instead: it credits half of the interaction of image
    and nouns to knowledge, which is part of its share of the prompt; it can split the shares further, by object and word
    (`circuits.input_attribution.shapley_split.split_shapley`).

    Parameters
    ----------
    model
        In evaluation mode.
    examples
        With candidate answers and one image.
    method
        ``telescoping``: the shares above. ``shapley``: Shapley values of image and prompt, next to the prior.
    of
        The first answer, a: ``true``, the true one, or ``said``, the model's. The other, b, is the model's answer, or the true
        one, if the model is wrong, and the other candidate with the highest score if it is right.
    matched
        The text that is replaced for the form: the nouns of the ``question``, or the ``prefix``, such as the words of a caption
        before a word; the question is then in every run but those of the lean.
    matched_texts
        Questions (or prefixes) of the same form about other things, by example id. By default the nouns of the question are
        replaced by up to 8 other nouns of `examples` (`matched_questions`), or the prefix by up to 8 others
        (`matched_prefixes`).
    neutral_images
        Blank images: names (``blank``, the mean color of the image; ``white``, ``gray``, ``black``), or images. Default:
        ``("blank", "white")``. With ``method="shapley"``: ``blank``, ``blur``, ``noise``, or images of the same size.
    neutral_questions
        Questions without content; default ``("N/A", "Please answer.")``. With ``method="shapley"``: other questions with the same
        number of tokens, also by example id.
    batch_size
        Number of inputs per batch.
    seed
        Seed of the choice of other nouns, questions or prefixes.
    progress
        Whether to show progress; by default only if standard error is a terminal.
    **options
        Options of ``method="shapley"`` only: `image`, `prompt`, `neutral_prefixes`, `orders`.

    Returns
    -------
    Sources or ShapleySources
        Shares of every example, in order. `SourceShares` has the log-odds of each run, the standard deviations over nouns,
        neutral questions and blank images, and the log-odds without any image where the model can run without one.

    Raises
    ------
    ConfigError
        If an option has an unknown value or belongs to the other method.
    PatchError
        If `examples` is empty, or an example has no matched text.
    DataError
        If an example has no image or several, fewer than two candidates, or candidates that begin with the same token.
    ModelError
        If logits are not finite.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> answer = gs.input_attribution.split(model, questions)[0]
    >>> total = answer.lean + answer.form + answer.knowledge + answer.image
    >>> bool(abs(total - answer.log_odds) < 1e-9), len(answer.matched_texts)
    (True, 8)
    """
    if method not in METHODS:
        msg = f"unknown method '{method}'; choose {' or '.join(METHODS)}{nearest(method, METHODS)}"
        raise ConfigError(msg)
    if method == "shapley":
        if matched != "question" or matched_texts is not None:
            msg = (
                "matched and matched_texts are options of method='telescoping'; with 'shapley' use neutral_questions=…"
            )
            raise ConfigError(msg)
        return split_shapley(
            model,
            examples,
            of=of,
            neutral_images=("blank",) if neutral_images is None else neutral_images,
            neutral_questions=neutral_questions,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            **options,
        )
    blanks = BLANKS if neutral_images is None else tuple(neutral_images)
    neutral = NEUTRAL_QUESTIONS if neutral_questions is None else neutral_questions
    _check(model, examples, of, matched, blanks, neutral, cast("Mapping[str, object]", options))
    if matched_texts is None:
        find = matched_questions if matched == "question" else matched_prefixes
        matched_texts = find(model, examples, seed=seed)
    missing = next((e for e in examples if not matched_texts.get(e.id)), None)
    if missing is not None:
        what = "a noun that other nouns can replace" if matched == "question" else "another prefix of its kind"
        msg = (
            f"example '{missing.id}' has no matched text: '{missing.question}' needs {what} in the examples; pass "
            "matched_texts={id: […]}"
        )
        raise PatchError(msg)
    results = split_by_completion(
        model,
        examples,
        matched_texts,
        of=of,
        of_prefix=matched == "prefix",
        blanks=blanks,
        neutral_questions=tuple(neutral),
        batch_size=batch_size,
        progress=progress,
    )
    names = tuple(n if isinstance(n, str) else n.identity for n in blanks)
    return Sources(tuple(results), of, names, tuple(neutral), model.name, model.config_hash, model.weights_hash)


def _check(
    model: Lvlm,
    examples: Sequence[Example],
    of: str,
    matched: str,
    blanks: Sequence[str | ImageSource],
    neutral: Iterable[str] | Mapping[str, Sequence[str]],
    options: Mapping[str, object],
) -> None:
    """Check the options of the telescoping shares, and the examples."""
    require_one_image(examples, "the attribution to sources")
    for name, value, allowed in (("of", of, ("true", "said")), ("matched", matched, _MATCHED)):
        if value not in allowed:
            msg = f"unknown {name} '{value}'; choose {' or '.join(allowed)}{nearest(value, allowed)}"
            raise ConfigError(msg)
    if options:
        msg = f"{', '.join(options)}: only for method='shapley'; leave it out, or choose that method"
        raise ConfigError(msg)
    unknown = next((n for n in blanks if isinstance(n, str) and n not in BLANK_NAMES), None)
    if unknown is not None or not blanks:
        problem = f"unknown blank image '{unknown}'" if unknown is not None else "neutral_images is empty"
        near = nearest(unknown or "", BLANK_NAMES)
        msg = f"{problem}; choose from {', '.join(BLANK_NAMES)}{near}, or pass images"
        raise ConfigError(msg)
    if isinstance(neutral, str | Mapping) or not tuple(neutral):
        msg = "neutral_questions must be a list of questions without content, such as ['N/A']; it is the same for all examples"
        raise ConfigError(msg)
    if not examples:
        msg = "examples is empty; pass at least one"
        raise PatchError(msg)
    few = next((e for e in examples if len(e.candidates) < 2), None)
    if few is not None:
        msg = f"example '{few.id}' has fewer than two candidate answers; log-odds compare two: set candidates, or leave it out"
        raise DataError(msg)
    without_prefix = next((e for e in examples if matched == "prefix" and not e.prefix), None)
    if without_prefix is not None:
        msg = f"example '{without_prefix.id}' has no prefix; use matched='question', or leave it out"
        raise PatchError(msg)
    check_evaluating(model)
    for example in examples:
        answer_key(model, example)
