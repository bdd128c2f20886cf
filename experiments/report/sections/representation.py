"""Representation and behavior: alignment by layer, information along the path, ceilings of behavior, and their regression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.report import representation_figures as figures
from experiments.report.html import closed, figure, paragraph, section, table
from experiments.results.run_files import RunFiles
from groundscope.core.text import format_count

if TYPE_CHECKING:
    from diagnosis import CorrectnessRegression, RepresentationStudy
    from groundscope.core.statistics import Estimate
    from probes import InformationPath

TITLES = {
    "cosine": "cosine",
    "image_to_text@1": "image to text, R@1",
    "text_to_image@1": "text to image, R@1",
    "cka": "CKA",
    "cknna": "CKNNA",
    "mutual_knn": "mutual neighbors",
    "modality_gap": "modality gap",
}
"""Measure to the title of its panel."""
PATHS = {
    "image": "Image path",
    "question": "The question alone",
    "caption": "The caption alone",
}


def representation_section(run: RunFiles) -> str:
    """Return the section."""
    study = run.representation
    parts = [
        paragraph(
            "Does what the model represents bound what it says? Alignment compares images with texts, each run alone. "
            "Information is how much a reader's log-loss falls when it reads a place, in nats. The ceiling of behavior is the "
            "accuracy at which a linear probe reads the true answers. None of these shows that the model uses what it "
            "represents: patching does."
        ),
        *_alignment(study),
        *_information(study),
        *_ceilings(study),
        *([] if study.regression is None else _regression(study.regression)),
        *(
            paragraph(f"Not measured: {part}. {_sentence(reason)}", soft=True)
            for part, reason in study.left_out.items()
        ),
    ]
    return section("representation", "Representation and behavior", *parts, stages=("trace", "representation"))


def _sentence(text: str) -> str:
    """Return a reason as a sentence."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _alignment(study: RepresentationStudy) -> list[str]:
    if not len(study.alignment):
        return []
    texts = str(study.provenance.get("texts", "texts"))
    images = format_count(int(study.alignment["images"].iloc[0]), "image")
    best = study.best.to_dict("records")
    rows = [
        [TITLES.get(str(r["measure"]), str(r["measure"])), r["image_layer"],
         *(f"{r[name]:.3f}" for name in ("value", "baseline", "p"))]
        for r in best
    ]  # fmt: skip
    return [
        figure(
            figures.alignment(study.alignment, TITLES),
            f"Alignment of {images} alone with their {texts} alone, by decoder layer. Gray: mean and two standard deviations "
            "over permuted images. Filled: p at most .05, with the choice of the layer repeated in every permutation. The "
            "modality gap does not depend on pairs, and has an interval.",
        ),
        closed(
            "representation-best",
            "The best layer of each measure",
            table(["measure", "layer", "value", "mean of the best under permutation", "p with the choice of a layer"], rows),
        ),
    ]  # fmt: skip


def _information(study: RepresentationStudy) -> list[str]:
    if not study.paths:
        return []
    titles = {name: f"{PATHS.get(name, name)}: {_concept(path)}" for name, path in study.paths.items()}
    sentences = [
        f"{PATHS.get(name, name)}: {changes}" for name, path in study.paths.items() if (changes := _changes(path))
    ]
    rows = [
        [PATHS.get(name, name), r["site"], r["family"], f"{r['nats']:.3f} [{r['low']:.3f}, {r['high']:.3f}]",
         f"{100 * r['kept_variance']:.0f} %", r["words"]]
        for name, path in study.paths.items()
        for r in path.frame().to_dict("records")
    ]  # fmt: skip
    return [
        figure(
            figures.information(study.paths, titles),
            "Where information becomes unavailable: nats about the concept that a linear and a nonlinear reader get at each "
            "place, with 95 % intervals over images; at most H(Z). Words name changes that are significant after Holm's "
            "correction and against the width control. After the image tokens follow the layers of the last token: a fall at "
            "its first layer says that the token has not read the image yet.",
        ),
        *(paragraph(sentence) for sentence in sentences),
        closed(
            "representation-nats",
            "Nats at each place",
            table(["path", "place", "reader", "nats", "variance kept", "change from the place before"], rows),
        ),
    ]


def _concept(path: InformationPath) -> str:
    """Return the concept in a few words, with the number of rows."""
    level = path.concept.partition(":")[0]
    if len(path.classes) > 2 or "," in path.concept:
        what = f"{level} ({', '.join(path.classes)})"
    else:
        what = path.concept.replace(":", " ")
    return f"{what}, {format_count(len(path.ids), 'row')}"


def _changes(path: InformationPath) -> str:
    """Return the significant changes as a sentence."""
    words = [f"{c.words} from {c.earlier} to {c.later}" for c in path.changes if c.words]
    return f"{'; '.join(words)}." if words else "no significant change."


def _ceilings(study: RepresentationStudy) -> list[str]:
    if study.ceilings is None:
        return []
    cells = study.ceilings.cells
    violated = [f"{c.concept}, {c.condition}" for c in cells if c.violated]
    headroom = [c for c in cells if c.high < 0]
    sentence = (
        f"Answers are more accurate than the probes in {', '.join(violated)}: there, representation as linear probes read it "
        "does not bound behavior. "
        if violated
        else "In no cell are answers more accurate than what probes read, beyond chance. "
    )
    if headroom:
        named = "; ".join(f"{c.concept}, {c.condition} ({c.headroom:.2f})" for c in headroom)
        sentence += f"What is represented is not used in full (headroom): {named}."
    rows = [
        [c.concept, c.condition, c.n, f"{c.behavior:.3f}", f"{c.ceiling:.3f}",
         f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]", f"{c.q:.3f}", "yes" if c.violated else "no"]
        for c in cells
    ]  # fmt: skip
    missing = [
        paragraph(f"No ceiling of {name}. {_sentence(reason)}", soft=True)
        for name, reason in study.ceilings.left_out.items()
    ]
    return [
        figure(
            figures.ceilings(study.ceilings),
            "Accuracy of answers and of probes on the same questions, by kind of question and split, with 95 % intervals of the "
            "difference. The probes' layer is chosen on other images, again in every draw. A circle marks a violated ceiling.",
        ),
        paragraph(sentence),
        closed(
            "representation-cells",
            "Ceilings by cell",
            table(["concept", "condition", "n", "behavior", "ceiling", "difference", "q", "violated"], rows),
        ),
        *missing,
    ]


def _regression(result: CorrectnessRegression) -> list[str]:
    def cell(effect: Estimate | None) -> str:
        return "-" if effect is None else f"{effect.value:.2f} [{effect.low:.2f}, {effect.high:.2f}]"

    quantile = f"change of the {result.quantile:.0%} quantile of the margin"
    rows = [[name, cell(effect), cell(result.slopes.get(name))] for name, effect in result.odds_ratios.items()]
    return [
        table(["one standard deviation more of", "odds ratio of a right answer", quantile], rows),
        paragraph(
            f"Regressions of {format_count(result.n, 'answer')} about {format_count(result.groups, 'image')}, with kind, split, "
            "object size and the log-odds of the words alone as controls, as far as they vary. AUC for right answers on held-out "
            f"images: {result.auc:.3f}; with the controls alone {result.auc_controls:.3f}; difference "
            f"{result.difference.value:+.3f} [{result.difference.low:+.3f}, {result.difference.high:+.3f}]. Correlations: a "
            "hard image may lower both.",
        ),
    ]  # fmt: skip
