"""Representation and behavior of one model on one set of questions: alignment, information, ceilings and their regression.

The survey of Shu et al. (arXiv 2501.01346) holds that misaligned representations bound what a model says (appendix B), measures
alignment (appendix C) and explains misalignment by information that is lost on the way (appendix D). `study_representation`
measures all three on the same questions; each part that the data or the model do not allow is left out with its reason.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from activation_store import ActivationStore, trace
from concepts.image_captions import caption_images
from concepts.schema import ConceptDataset
from diagnosis.ceiling import Ceilings, representation_ceiling
from diagnosis.ceiling_regression import CorrectnessRegression, regress_correctness
from diagnosis.path_concept import PathConcept, choose_concept, choose_object
from groundscope.core import artifacts
from groundscope.core.errors import DataError, GroundscopeError, StoreError
from groundscope.core.result_fields import building
from groundscope.core.statistics import Estimate
from groundscope.core.text import format_count
from lvlm import Lvlm
from probes import InformationPath, PathSite, image_sites, information_path
from probes.alignment import measure_layers
from probes.alignment.layer_scores import LayerAlignment

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
FORMAT, VERSION, FILE = "groundscope.representation", 1, "representation.json"
IMAGES = 300
"""Largest number of images that are compared with texts."""
ROWS = 400
"""Largest number of questions whose information is measured along a path."""
MIN_CAPTIONS = 50
"""Smallest number of images with a caption; with fewer, images are compared with their questions."""
RESAMPLES = 200
"""Draws of the bootstrap of the regression."""


@dataclass(frozen=True, eq=False)
class RepresentationStudy:
    """What a model represents and what it says, on the same questions; returned by `study_representation`.

    Examples
    --------
    >>> import pandas as pd
    >>> from diagnosis import RepresentationStudy
    >>> study = RepresentationStudy(pd.DataFrame(), pd.DataFrame(), {}, None, None, {"ceilings": "no answers"})
    >>> study.left_out["ceilings"]
    'no answers'
    """

    alignment: pd.DataFrame
    """One row per layer and measure, as `probes.alignment.LayerAlignment.table`."""
    best: pd.DataFrame
    """One row per measure: its best layer, with a p that includes this choice."""
    paths: Mapping[str, InformationPath]
    """Information along the ``image`` path, in the ``question`` alone, and in the ``caption`` alone."""
    ceilings: Ceilings | None
    regression: CorrectnessRegression | None
    """Right answers on the probe's margin and the alignment of the image with its text, with controls."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Part that could not be measured to the reason."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("paths", "left_out", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def save(self, folder: str | Path) -> Path:
        """Write ``representation.json`` and one file for each path and for the ceilings into a folder; return the first."""
        root = Path(folder)
        for name, path in self.paths.items():
            path.save(root / f"information-{name}.safetensors")
        if self.ceilings is not None:
            self.ceilings.save(root / "ceilings.safetensors")
        content = {
            **{name: _records(getattr(self, name)) for name in ("alignment", "best")},
            "paths": list(self.paths),
            "ceilings": self.ceilings is not None,
            "regression": None if self.regression is None else _regression_record(self.regression),
            "left_out": dict(self.left_out),
            "provenance": json.loads(json.dumps(dict(self.provenance), default=str)),
        }
        document = artifacts.sign_document(FORMAT, VERSION, content)
        artifacts.write_bytes(root / FILE, (json.dumps(document, indent=1) + "\n").encode(), "representation study")
        return root / FILE

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote; raises `StoreError` if a file is missing, damaged, or another file."""
        import pandas as pd

        root = Path(folder)
        document = artifacts.read_document(root / FILE, FORMAT, "representation study", VERSION, advice="measure again")
        with building(f"{root / FILE} is a damaged representation study", StoreError):
            names = [str(name) for name in document["paths"]]
            alignment, best = (
                pd.DataFrame(document[name]).astype({"head": "Int64"}) if document[name] else pd.DataFrame()
                for name in ("alignment", "best")
            )
            record = document["regression"]
            return cls(
                alignment,
                best,
                {name: InformationPath.load(root / f"information-{Path(name).name}.safetensors") for name in names},
                Ceilings.load(root / "ceilings.safetensors") if document["ceilings"] else None,
                None if record is None else _regression(record),
                dict(document["left_out"]),
                dict(document["provenance"]),
            )

    def text(self) -> str:
        """Return the main results in a few lines."""
        lines = []
        if len(self.best):
            values = ", ".join(
                f"{r['measure']} {r['value']:.2f} (p {r['p']:.3f})" for r in self.best.to_dict("records")
            )
            lines.append(
                f"alignment of images with their {self.provenance.get('texts', 'texts')}, best layer: {values}"
            )
        for name, path in self.paths.items():
            changes = [f"{c.words} from {c.earlier} to {c.later}" for c in path.changes if c.words]
            lines.append(
                f"information, {name}: {path.concept}, H(Z) {path.entropy:.2f} nats; {'; '.join(changes) or 'no change'}"
            )
        if self.ceilings is not None:
            worst = max(self.ceilings.cells, key=lambda cell: cell.headroom)
            violations = format_count(sum(cell.violated for cell in self.ceilings.cells), "violation")
            lines.append(
                f"ceilings: {violations} in {format_count(len(self.ceilings.cells), 'cell')}; largest headroom "
                f"{worst.headroom:.2f} ({worst.concept}, {worst.condition})"
            )
        if self.regression is not None:
            lines.append(str(self.regression))
        return "\n".join(
            [*lines, *(f"not measured: {part}, because {reason}" for part, reason in self.left_out.items())]
        )


def study_representation(
    model: Lvlm,
    data: ConceptDataset,
    store: ActivationStore,
    *,
    images: int = IMAGES,
    rows: int = ROWS,
    families: Sequence[str] = ("linear", "nonlinear"),
    permutations: int = 199,
    resamples: int = RESAMPLES,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> RepresentationStudy:
    """Measure alignment, information along the path, and ceilings of behavior on the questions of a store.

    Images and texts are traced again, each alone: images with their captions (or their questions, if fewer than
    `MIN_CAPTIONS` images have one), and questions without their images. Everything else is read from the store. The cost is
    linear in layers: each layer is traced, compared and fitted once.

    Parameters
    ----------
    model
        The model of the store; for alignment it must run on text alone.
    data
        The questions of the store, with their images.
    store
        Activations with ``resid_post`` at ``last``, and for the image path at ``object:mean`` or ``image:mean``.
    images
        Largest number of images that are compared with texts.
    rows
        Largest number of questions whose information is measured.
    families
        Readers of information; the nonlinear one takes most of the time, and without it no fall is called "lost".
    permutations
        Of the nulls of alignment, 0 or at least 199.
    resamples
        Draws of the bootstrap of the regression; that of the ceilings has ten times as many.
    batch_size, seed, progress
        Examples per forward pass; seed of folds and draws; whether to show progress, by default on a terminal only.

    Raises
    ------
    DataError
        If a row of the store is not among the examples of `data`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(30, splits=("neutral",)).where(kind="color")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = gs.trace(model, data, sites=["resid_post"], tokens=["last"], out=Path(folder) / "store", progress=False)
    ...     study = gs.study_representation(model, data, store, permutations=0, resamples=20, progress=False)
    >>> sorted(study.left_out)
    ['image path', 'question path', 'regression']
    """
    by_id = {e.id: e for e in data}
    ids = [str(v) for v in store.columns["id"]]
    if missing := next((i for i in ids if i not in by_id), None):
        msg = f"example '{missing}' of the store is not in the dataset; pass the dataset that was traced"
        raise DataError(msg)
    questions = ConceptDataset(data.name, tuple(by_id[i] for i in ids), data.provenance)
    left_out: dict[str, str] = {}
    frame = store.frame()

    def attempt(part: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except GroundscopeError as error:
            left_out[part] = str(error)
            return None

    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "unembedding": False}
    with tempfile.TemporaryDirectory() as folder:
        alone = attempt(
            "question path",
            lambda: trace(
                model, questions, ["resid_post"], ["last"], Path(folder) / "questions", input="text", **options
            ),
        )
        texts, selection = _texts(data, images)
        sides = attempt("alignment", lambda: _trace_sides(model, texts, selection, Path(folder), options))
        scores = None if sides is None else attempt(
            "alignment", lambda: _align(sides, selection, images, permutations=permutations, seed=seed, progress=progress)
        )  # fmt: skip
        paths = {}
        concept = attempt("image path", lambda: choose_concept(store, rows))
        if concept is not None:
            measured = attempt("image path", lambda: _image_path(store, concept, families, seed, progress))
            paths |= {} if measured is None else {"image": measured}
            if alone is not None:
                measured = attempt(
                    "question path", lambda: _text_path(alone, "last", concept, families, seed, progress)
                )
                paths |= {} if measured is None else {"question": measured}
        elif alone is not None:
            left_out["question path"] = left_out["image path"]
        if sides is not None and selection.startswith("answer"):
            measured = attempt("caption path", lambda: _caption_path(sides[1], selection, families, seed, progress))
            paths |= {} if measured is None else {"caption": measured}
        ceilings = attempt(
            "ceilings",
            lambda: representation_ceiling(store, skip=True, resamples=10 * resamples, seed=seed, progress=progress),
        )
        image_scores = None if sides is None else attempt("regression", lambda: _image_scores(sides, selection, texts))
        regression = None
        if ceilings is None or image_scores is None or alone is None:
            left_out.setdefault("regression", "it needs ceilings, alignment, and questions without their images")
        else:
            prior = np.asarray(alone.columns["margin"], float)
            regression = attempt(
                "regression",
                lambda: _regress(frame, questions, ceilings, image_scores, prior, resamples, seed, progress),
            )
    import pandas as pd

    return RepresentationStudy(
        pd.DataFrame() if scores is None else scores.table(),
        pd.DataFrame() if scores is None else scores.best(),
        paths,
        ceilings,
        regression,
        left_out,
        {
            "model": model.name,
            "weights_hash": model.weights_hash,
            "store": store.digest,
            "texts": "captions" if selection.startswith("answer") else "questions",
            "options": {
                "images": images, "rows": rows, "families": list(families), "permutations": permutations,
                "resamples": resamples, "seed": seed,
            },
        },
    )  # fmt: skip


def _texts(data: ConceptDataset, images: int) -> tuple[ConceptDataset, str]:
    """Return the texts that images are compared with, and their tokens: captions, or else questions."""
    captions = caption_images(data)
    if len(captions) >= MIN_CAPTIONS:
        # Every edited copy of an image has its own caption; a null needs whole images, the first of each group.
        return captions, "answer:mean"
    chosen = list(dict.fromkeys(e.group for e in data))[:images]
    return data.filter(lambda e: e.group in set(chosen) and len(e.images) == 1), "question:mean"


def _trace_sides(
    model: Lvlm, texts: ConceptDataset, selection: str, folder: Path, options: Mapping[str, Any]
) -> tuple[ActivationStore, ActivationStore]:
    """Return the stores of images alone and of texts alone."""
    if not len(texts):
        msg = "no example has one image"
        raise DataError(msg)
    images = trace(model, texts, ["resid_post"], ["image:mean"], folder / "images", input="image", **options)
    return images, trace(model, texts, ["resid_post"], [selection], folder / "texts", input="text", **options)


def _first_of_groups(store: ActivationStore, count: int) -> np.ndarray:
    """Return the first row of each of the first groups, bool ``[n]``."""
    groups = [str(g) for g in store.columns["group"]]
    first = {g: i for i, g in reversed(list(enumerate(groups)))}
    rows = np.zeros(len(groups), bool)
    rows[sorted(first.values())[:count]] = True
    return rows


def _align(
    sides: tuple[ActivationStore, ActivationStore],
    selection: str,
    images: int,
    *,
    permutations: int,
    seed: int,
    progress: bool | None,
) -> LayerAlignment:
    rows = _first_of_groups(sides[0], images) if selection.startswith("answer") else None
    return measure_layers(
        *sides, text=selection, rows=rows, permutations=permutations, resamples=200, seed=seed, progress=progress
    )


def _image_path(
    store: ActivationStore, concept: PathConcept, families: Sequence[str], seed: int, progress: bool | None
) -> InformationPath:
    path = image_sites(store, tokens=concept.tokens)
    return information_path(path, concept.names, rows=concept.rows, families=families, seed=seed, progress=progress)


def _text_path(
    store: ActivationStore, tokens: str, concept: PathConcept, families: Sequence[str], seed: int, progress: bool | None
) -> InformationPath:
    """Return the information in the texts alone, about what the store's rows show."""
    array = next(a for a in store.arrays if (a.stack, a.component, str(a.tokens)) == ("decoder", "resid_post", tokens))
    path = [PathSite(store, f"decoder.L{layer}.resid_post", tokens) for layer in array.layers]
    return information_path(path, concept.names, rows=concept.rows, families=families, seed=seed, progress=progress)


def _caption_path(
    store: ActivationStore, selection: str, families: Sequence[str], seed: int, progress: bool | None
) -> InformationPath:
    return _text_path(store, selection, choose_object(store.frame()), families, seed, progress)


def _image_scores(
    sides: tuple[ActivationStore, ActivationStore], selection: str, texts: ConceptDataset
) -> dict[str, np.ndarray]:
    """Return the cosine of each image with its text at each layer ``[layers]``, by the image's identity."""
    scores = measure_layers(*sides, text=selection, measures=["cosine"], permutations=0, resamples=0, progress=False)
    image_of = {e.id: e.image.identity for e in texts}
    values: dict[str, list[np.ndarray]] = {}
    for i, name in enumerate(scores.ids):
        values.setdefault(image_of[name], []).append(scores.scores["cosine"][:, i])
    return {image: np.mean(of_image, axis=0) for image, of_image in values.items()}


def _regress(
    frame: pd.DataFrame,
    questions: ConceptDataset,
    ceilings: Ceilings,
    image_scores: Mapping[str, np.ndarray],
    prior: np.ndarray,
    resamples: int,
    seed: int,
    progress: bool | None,
) -> CorrectnessRegression:
    """Regress right answers on the probe's margin and the image's alignment, with kind, split, size and prior as controls."""
    margin_of = dict(zip(ceilings.ids, ceilings.margins, strict=True))
    ids = frame["id"].astype(str).tolist()
    margins = np.array([margin_of.get(i, np.nan) for i in ids])
    correct, own = frame["correct"].to_numpy(float), frame["margin"].to_numpy(float)
    unknown = np.full(len(next(iter(image_scores.values()))), np.nan)
    aligned = np.array([image_scores.get(e.image.identity, unknown) for e in questions])  # [n, layers]
    used = np.isfinite(margins) & np.isfinite(correct) & np.isfinite(own) & np.isfinite(prior)
    used &= np.isfinite(aligned).all(axis=1)
    if not used.any():
        msg = "no question has an answer, a probe's margin, and an alignment of its image"
        raise DataError(msg)
    at = np.flatnonzero(used)
    controls: dict[str, Any] = {
        name: [str(frame[name].iloc[i]) for i in at] for name in ("kind", "split") if frame[name].iloc[at].nunique() > 1
    }
    controls["words alone"] = prior[at]
    sizes = [_area(questions, int(i)) for i in at]
    if np.isfinite(sizes).all() and np.ptp(sizes) > 0:
        controls["object size"] = np.array(sizes)
    scores = {"probe margin": margins[at], "alignment": aligned[at].T}
    groups = frame["group"].astype(str).to_numpy()[at]
    return regress_correctness(
        correct[at] == 1, scores, groups, controls=controls, margins=own[at], resamples=resamples, seed=seed, progress=progress
    )  # fmt: skip


def _area(questions: ConceptDataset, row: int) -> float:
    """Return the area of the box of the object of a question, in pixels; 0 for an absent object, NaN without a box."""
    example = questions[row]
    item = example.named_object()
    if item is None:
        return 0.0 if example.objects else float("nan")
    return float((item.box.x1 - item.box.x0) * (item.box.y1 - item.box.y0)) if item.box is not None else float("nan")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(str(table.to_json(orient="records", double_precision=15)))


def _regression_record(result: CorrectnessRegression) -> dict[str, Any]:
    record = {**vars(result), "difference": asdict(result.difference)}
    for name in ("odds_ratios", "slopes"):
        record[name] = {k: asdict(v) for k, v in record[name].items()}
    return {**record, "layers": {k: list(v) for k, v in result.layers.items()}}


def _regression(record: Mapping[str, Any]) -> CorrectnessRegression:
    values = {name: {k: Estimate(**v) for k, v in record[name].items()} for name in ("odds_ratios", "slopes")}
    layers = {str(k): tuple(map(int, v)) for k, v in record["layers"].items()}
    return CorrectnessRegression(
        **{**record, **values, "difference": Estimate(**record["difference"]), "layers": layers}
    )
