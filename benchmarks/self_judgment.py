"""Debiased self-judgment on the embedded model: the score as a detector, and captions chosen by it.

    python benchmarks/self_judgment.py [--quick] [--save]

Scenes are synthetic, and their known truth takes the place of a third model. The judge's prompt is "Is the {noun} {attribute}?";
the paper's has words that the model does not know. Sentences are phrases of captions ("a red apple"). Intervals are 95 % over
scenes. Figures:

detector, SENTENCES, SCORE, BLIND FORM
    AUC over all phrases and over pairs of phrases about one scene, and rank correlation with the truth, of f, f_blind and
    S = (1 + alpha) f - alpha f_blind; text bias is the rank correlation of f with f_blind. SENTENCES are ``stated``: the objects
    of each scene, the same with another color, and other objects; or ``written``: phrases of the model's own captions under
    greedy decoding, beams and DSGD with its controls. A phrase is true if the scene has an object with this noun and color;
captions, METHOD, N tokens
    CHAIR_s, CHAIR_i, recall, BLEU-4 against the scene's description, words, share of phrases that are true of the scene, and
    forward passes and rows of forward passes for each phrase.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.table import Table

from behavior import answer, bleu
from behavior.chair import score_captions
from benchmarks._harness import describe_device, finish, option_parser, progress, wide_console
from concepts import scenes
from concepts.scenes.distributions import COLOR_NAMES
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset, Example
from groundscope.core.statistics import Estimate, estimate
from lvlm import load_lvlm
from lvlm.active_interventions import mark_observer
from lvlm.model import Lvlm
from mitigation import training_free_methods
from mitigation.self_judgment import (
    ALPHAS,
    EMBEDDED_TEMPLATE,
    Judge,
    Judgments,
    SelfJudgmentDecoding,
    detect,
)
from mitigation.self_judgment.judge import BLIND_FORMS, Score, judge_logits, strip_ends
from mitigation.training_free.method import TrainingFree

ENDS = (",", ".", "and")
LENGTHS = (12, 40)
SCORES: tuple[Score, ...] = ("logit", "logprob", "margin")
DSGD = SelfJudgmentDecoding(template=EMBEDDED_TEMPLATE, ends=ENDS)
METHODS: Mapping[str, TrainingFree | None] = {
    "greedy": None,
    "beam 5": training_free_methods["beam"](),
    "DoLa": training_free_methods["dola"](),
    "OPERA": training_free_methods["opera"](),
    "DSGD": DSGD,
    "DSGD, score margin": replace(DSGD, score="margin"),
}
CONTROLS: Mapping[str, TrainingFree] = {
    f"DSGD control: {name}": replace(DSGD, choice=choice)
    for name, choice in (
        ("f without debiasing", "image"),
        ("f_blind alone", "blind"),
        ("highest likelihood", "likelihood"),
        ("random candidate", "random"),
    )
}


def phrases_of(text: str) -> list[str]:
    """Return the phrases of a caption."""
    for end in (",", "."):
        text = text.replace(end, " , ")
    parts: list[list[str]] = [[]]
    for word in text.split():
        if word in ENDS:
            parts.append([])
        else:
            parts[-1].append(word)
    return [strip_ends(" ".join(part), ENDS) for part in parts if part]


def is_true(phrase: str, example: Example) -> bool:
    """Return whether a scene has an object with the noun and the color of a phrase: "a red apple"."""
    words = phrase.split()
    colors = [word for word in words if word in COLOR_NAMES]
    nouns = [word for word in words if word in NOUNS]
    return len(nouns) == 1 and any(
        o.noun == nouns[0] and all(o.attributes["color"] == color for color in colors) for o in example.objects
    )


def stated_phrases(example: Example, rng: np.random.Generator) -> list[str]:
    """Return phrases about the objects of a scene, the same with another color, and with another object."""

    def phrase(color: str, noun: str) -> str:
        return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {noun}"

    present = {o.noun for o in example.objects}
    absent = [noun for noun in NOUNS if noun not in present]
    phrases = []
    for o in example.objects:
        color = o.attributes["color"]
        others = [c for c in COLOR_NAMES if c != color]
        phrases += [
            phrase(color, o.noun),
            phrase(others[int(rng.integers(len(others)))], o.noun),
            phrase(color, absent[int(rng.integers(len(absent)))]),
        ]
    return phrases


def captioned_scenes(seeds: Sequence[int], count: int) -> ConceptDataset:
    """Return `count` scenes with the question for a caption, for each seed."""
    examples = []
    for seed in seeds:
        data = scenes.dataset(12 * count, seed=seed).where(kind="caption")[:count]
        examples += [replace(e, id=f"{seed}/{e.id}", group=f"{seed}/{e.group}") for e in data]
    return ConceptDataset("captioned scenes", tuple(examples))


@contextmanager
def counting_rows(model: Lvlm) -> Iterator[list[int]]:
    """Collect the number of rows of each forward pass."""
    rows: list[int] = []

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(len(kwargs["input_ids"]))

    hook = model.hf.register_forward_pre_hook(mark_observer(count), with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def write_captions(
    model: Lvlm, data: ConceptDataset, method: TrainingFree | None, limit: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the figures of a method's captions, and the captions."""
    with nullcontext() if method is None else method.applied(model), counting_rows(model) as rows:
        answers = answer(model, data, max_new_tokens=limit, batch_size=1, progress=False)
    captions = {a.id: a.text or "" for a in answers.answers}
    scored = score_captions(answers, data, vocabulary=NOUNS)
    examples = {e.id: e for e in data}
    truths = {name: [is_true(p, examples[name]) for p in phrases_of(text)] for name, text in captions.items()}
    phrases = sum(map(len, truths.values()))
    counts = [len(values) for values in truths.values()]
    true = estimate([sum(values) for values in truths.values()], [examples[name].group for name in truths], counts)
    figures = {
        "chair_s": as_dict(scored.chair_s),
        "chair_i": as_dict(scored.chair_i),
        "recall": as_dict(scored.recall),
        "bleu_4": round(bleu(captions, {e.id: [e.answer] for e in data}), 4),
        "words": round(float(np.mean([len(text.split()) for text in captions.values()])), 2),
        "true_phrases": as_dict(true),
        "forwards_per_phrase": round(len(rows) / max(1, phrases), 2),
        "rows_per_phrase": round(sum(rows) / max(1, phrases), 2),
        "n": len(data),
    }
    return figures, captions


def as_dict(e: Estimate) -> dict[str, float]:
    """Return an estimate as JSON values."""
    return {"value": round(e.value, 4), "low": round(e.low, 4), "high": round(e.high, 4), "n": e.n}


def judge_all(
    model: Lvlm, data: ConceptDataset, phrases: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], Judgments]:
    """Return the judgments of all phrases for each score and blind form; the mean form is the mean of the other two."""
    judges = {score: Judge(EMBEDDED_TEMPLATE, score) for score in SCORES}
    values: dict[tuple[str, str], list[np.ndarray]] = {}
    for example in data:
        if phrases[example.id]:
            questions = [judges["logit"].question(phrase, ENDS) for phrase in phrases[example.id]]
            sides = judge_logits(model, example, questions, ("removed", "unknown"))
            for score, judge in judges.items():
                for side, logits in zip(("image", "removed", "unknown"), sides, strict=True):
                    values.setdefault((score, side), []).append(judge.score_of(model).of(logits))
    whole = {key: np.concatenate(several) for key, several in values.items()}
    for score in SCORES:
        whole[score, "mean"] = (whole[score, "removed"] + whole[score, "unknown"]) / 2
    return {
        (score, form): Judgments(whole[score, "image"], whole[score, form]) for score in SCORES for form in BLIND_FORMS
    }


def measure_detector(model: Lvlm, data: ConceptDataset, phrases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the figures of the scores as detectors of true phrases."""
    labels = [is_true(p, e) for e in data for p in phrases[e.id]]
    groups = [e.group for e in data for _ in phrases[e.id]]
    figures: dict[str, Any] = {}
    for (score, form), judgments in judge_all(model, data, phrases).items():
        result = detect(judgments, labels, groups, alphas=ALPHAS, resamples=500)
        figures[f"{score}, {form}"] = {
            "true": sum(labels),
            "n": len(labels),
            "text_bias": as_dict(result.text_bias),
            **{
                row.score: {
                    "auc": as_dict(row.auc),
                    "auc_within": as_dict(row.auc_within),
                    "rank_correlation": as_dict(row.rank_correlation),
                }
                for row in result.rows
            },
        }
    return figures


def print_tables(figures: Mapping[str, Any]) -> None:
    """Print the tables."""
    console = wide_console()

    def text(e: Mapping[str, float]) -> str:
        return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"

    table = Table(
        "detector (synthetic scenes)", "text bias", "AUC f", "AUC f_blind", *(f"AUC S, a={a:g}" for a in ALPHAS)
    )
    for name, f in figures.items():
        if name.startswith("detector"):
            names = ("f", "f_blind", *(f"S alpha={a:g}" for a in ALPHAS))
            table.add_row(name.split(", ", 1)[1], text(f["text_bias"]), *(text(f[n]["auc"]) for n in names))
    console.print(table)
    columns = ("chair_s", "chair_i", "recall", "true_phrases")
    table = Table("captions (synthetic scenes)", *columns, "BLEU-4", "words", "forwards a phrase", "rows a phrase")
    for name, f in figures.items():
        if name.startswith("captions"):
            cells = [str(f[n]) for n in ("bleu_4", "words", "forwards_per_phrase", "rows_per_phrase")]
            table.add_row(name.split(", ", 1)[1], *(text(f[n]) for n in columns), *cells)
    console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, quick="8 scenes of one seed, greedy, DSGD and two controls", save=True, device=True)
    options = parser.parse_args()
    model = load_lvlm("tiny", device=options.device)
    seeds, count = ((0,), 8) if options.quick else ((0, 1, 2), 8)
    data = captioned_scenes(seeds, count)
    rows = [(name, method, LENGTHS[1]) for name, method in {**METHODS, **CONTROLS}.items()]
    rows += [(name, METHODS[name], LENGTHS[0]) for name in ("greedy", "beam 5", "DoLa", "OPERA", "DSGD")]
    if options.quick:
        quick = ("greedy", "DSGD", *list(CONTROLS)[2:])
        rows = [row for row in rows if row[0] in quick and row[2] == LENGTHS[1]]
    figures: dict[str, Any] = {}
    written: dict[str, dict[str, None]] = {e.id: {} for e in data}
    with progress("self-judgment", len(rows) + 2) as advance:
        rng = np.random.default_rng(0)
        stated = {e.id: stated_phrases(e, rng) for e in data}
        for name, f in measure_detector(model, data, stated).items():
            figures[f"detector, stated, {name}"] = f
        advance()
        for name, method, limit in rows:
            figures[f"captions, {name}, {limit} tokens"], captions = write_captions(model, data, method, limit)
            print(name, limit, figures[f"captions, {name}, {limit} tokens"], flush=True)
            for identity, text in captions.items():
                written[identity].update(dict.fromkeys(phrases_of(text)))
            advance()
        for name, f in measure_detector(
            model, data, {name: list(phrases) for name, phrases in written.items()}
        ).items():
            figures[f"detector, written, {name}"] = f
        advance()
    print_tables(figures)
    device = describe_device("torch", "transformers", "numpy", device=options.device)
    finish("self_judgment", device, figures, save=options.save, seeds=list(seeds), data="synthetic scenes")


if __name__ == "__main__":
    main()
