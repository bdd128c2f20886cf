"""Icon scenes as image files with annotations in the formats of COCO, GQA, Visual Genome, VAW, POPE, What'sUp and pairs.

The truth of every question that a loader makes from these files is known exactly, and the embedded model can answer many of
them, so a run on such files shows whether the whole job works on a user's files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concepts import counterfactuals
from concepts.annotated_object import AnnotatedObject
from concepts.outlines import outline_record
from concepts.question import YES_NO
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest
from groundscope.testing.scene_photographs import save_as_photographs


@dataclass(frozen=True)
class AnnotationFiles:
    """Paths of the files of one format.

    Examples
    --------
    >>> from pathlib import Path
    >>> from groundscope.testing.annotation_files import AnnotationFiles
    >>> AnnotationFiles("gqa", Path("a/gqa.json"), Path("a/images"), {}).options
    {}
    """

    source: str
    """Name of the loader."""
    file: Path
    """File of questions or annotations."""
    images: Path
    """Folder of the images."""
    options: Mapping[str, Any]
    """Further files, by the name of the loader's option."""

    def load(self) -> ConceptDataset:
        """Return the questions."""
        from concepts import loaders

        return loaders.load(self.source, self.file, self.images, **self.options)


def save_annotations(data: ConceptDataset, folder: Path | str, source: str, *, quality: int = 90) -> AnnotationFiles:
    """Save the scenes of a dataset as JPEG files, with annotations in one format.

    Parameters
    ----------
    data
        Examples of icon scenes.
    folder
        Folder of the files; created if necessary.
    source
        A key of `FORMATS`.
    quality
        Quality of the JPEG files.

    Returns
    -------
    AnnotationFiles
        The files, as the loader and the command need them.

    Raises
    ------
    ConfigError
        For an unknown format.

    Examples
    --------
    >>> import tempfile
    >>> import groundscope as gs
    >>> from groundscope.testing.annotation_files import save_annotations
    >>> files = save_annotations(gs.scenes.dataset(10), tempfile.mkdtemp(), "gqa")
    >>> sorted({example.kind for example in files.load()})
    ['color', 'existence', 'relation', 'size']
    """
    return write_annotations(save_as_photographs(data, Path(folder) / "images", quality=quality), folder, source)


def write_annotations(photographs: ConceptDataset, folder: Path | str, source: str) -> AnnotationFiles:
    """Write annotations of scenes whose images are already saved in ``folder/images``, as by `save_composites`.

    Parameters
    ----------
    photographs
        Examples with objects and image files.
    folder
        Folder of the files, with the images in ``images``; these may be renamed.
    source
        A key of `FORMATS`.

    Raises
    ------
    ConfigError
        For an unknown format.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> from groundscope.testing.annotation_files import write_annotations
    >>> from groundscope.testing.composite_photographs import save_composites
    >>> folder = Path(tempfile.mkdtemp())
    >>> composites = save_composites(gs.scenes.dataset(10), folder / "images")
    >>> len(write_annotations(composites, folder, "vaw").load()[0].objects[0].outline) > 0
    True
    """
    if source not in FORMATS:
        msg = f"no annotation files of '{source}'; choose from {', '.join(FORMATS)}{nearest(source, FORMATS)}"
        raise ConfigError(msg)
    folder = Path(folder)
    first: dict[str, Example] = {}
    for example in photographs:
        first.setdefault(example.image.identity, example)
    return FORMATS[source](folder, photographs, list(first.values()))


def _size(example: Example) -> tuple[int, int]:
    return example.image.load().size


def _name(example: Example) -> str:
    return str(getattr(example.image, "name", ""))


def _number(example: Example) -> str:
    """Return the number in the file name, which GQA and Visual Genome use as the id of the image."""
    return str(int(Path(_name(example)).stem))


def _xywh(item: AnnotatedObject) -> dict[str, int]:
    box = item.require_box()
    return {"x": int(box.x0), "y": int(box.y0), "w": int(box.x1 - box.x0), "h": int(box.y1 - box.y0)}


def _left_or_right(example: Example) -> list[tuple[AnnotatedObject, str, AnnotatedObject]]:
    """Return the relation of the first two objects, from their centers, if it is clear."""
    if len(example.objects) < 2:
        return []
    first, second = example.objects[:2]
    difference = first.require_box().center[0] - second.require_box().center[0]
    return (
        []
        if abs(difference) < 0.1 * _size(example)[0]
        else [(first, f"to the {'left' if difference < 0 else 'right'} of", second)]
    )


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _points(item: AnnotatedObject) -> list[list[tuple[float, float]]] | None:
    """Return the polygons of an object; None without polygons, as VAW has no masks."""
    polygons = item.outline if isinstance(item.outline, tuple) else ()
    return [list(zip(polygon[::2], polygon[1::2], strict=True)) for polygon in polygons] or None


def _rename(images: Path, examples: list[Example]) -> None:
    for example in examples:
        (images / _name(example)).rename(images / f"{_number(example)}.jpg")


def _coco(folder: Path, _: ConceptDataset, scenes: list[Example]) -> AnnotationFiles:
    categories = sorted({o.noun for e in scenes for o in e.objects})
    document: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": noun} for i, noun in enumerate(categories)],
    }
    for number, scene in enumerate(scenes):
        width, height = _size(scene)
        document["images"].append({"id": number, "file_name": _name(scene), "width": width, "height": height})
        for item in scene.objects:
            box = list(_xywh(item).values())
            document["annotations"].append(
                {
                    "id": len(document["annotations"]),
                    "image_id": number,
                    "category_id": categories.index(item.noun),
                    "bbox": box,
                    "segmentation": outline_record(item.outline),
                }
            )
    return AnnotationFiles("coco", _write(folder / "coco.json", document), folder / "images", {})


def _gqa(folder: Path, _: ConceptDataset, scenes: list[Example]) -> AnnotationFiles:
    graphs = {}
    for scene in scenes:
        width, height = _size(scene)
        relations = _left_or_right(scene)
        objects = {
            item.id: {
                "name": item.noun, **_xywh(item), "attributes": list(item.attributes.values()),
                "relations": [{"name": name, "object": b.id} for a, name, b in relations if a is item],
            }
            for item in scene.objects
        }  # fmt: skip
        graphs[_number(scene)] = {"width": width, "height": height, "objects": objects}
    _rename(folder / "images", scenes)
    return AnnotationFiles("gqa", _write(folder / "gqa.json", graphs), folder / "images", {})


def _visual_genome(folder: Path, _: ConceptDataset, scenes: list[Example]) -> AnnotationFiles:
    objects, attributes, relationships = [], [], []
    for scene in scenes:
        number = int(_number(scene))
        ids = {item.id: 100 * number + i for i, item in enumerate(scene.objects)}
        boxes = [{"object_id": ids[o.id], **_xywh(o), "names": [o.noun]} for o in scene.objects]
        words = [{"object_id": ids[o.id], "attributes": list(o.attributes.values())} for o in scene.objects]
        relations = [
            {"predicate": name, "subject": {"object_id": ids[a.id]}, "object": {"object_id": ids[b.id]}}
            for a, name, b in _left_or_right(scene)
        ]
        objects.append({"image_id": number, "objects": boxes})
        attributes.append({"image_id": number, "attributes": words})
        relationships.append({"image_id": number, "relationships": relations})
    _rename(folder / "images", scenes)
    options = {
        "attributes": str(_write(folder / "attributes.json", attributes)),
        "relationships": str(_write(folder / "relationships.json", relationships)),
    }
    return AnnotationFiles("visual_genome", _write(folder / "objects.json", objects), folder / "images", options)


def _vaw(folder: Path, _: ConceptDataset, scenes: list[Example]) -> AnnotationFiles:
    colors = sorted({o.attributes["color"] for e in scenes for o in e.objects})
    records = []
    for scene in scenes:
        for i, item in enumerate(scene.objects):
            color, size = item.attributes["color"], item.attributes["size"]
            other = colors[(colors.index(color) + 1 + i) % len(colors)]
            records.append(
                {
                    "image_id": _number(scene), "instance_id": f"{_number(scene)}{i}", "object_name": item.noun,
                    "instance_bbox": list(_xywh(item).values()), "instance_polygon": _points(item),
                    "positive_attributes": [color, size],
                    "negative_attributes": [other, "small" if size == "big" else "big"],
                }
            )  # fmt: skip
    _rename(folder / "images", scenes)
    return AnnotationFiles("vaw", _write(folder / "vaw.json", records), folder / "images", {})


def _pope(folder: Path, data: ConceptDataset, _: list[Example]) -> AnnotationFiles:
    lines = [
        json.dumps({"question_id": number, "image": _name(e), "text": e.question, "label": e.answer})
        for number, e in enumerate(e for e in data if e.kind == "existence")
    ]
    file = folder / "pope.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return AnnotationFiles("pope", file, folder / "images", {})


def _whatsup(folder: Path, _: ConceptDataset, scenes: list[Example]) -> AnnotationFiles:
    records = []
    for scene in scenes:
        for first, name, second in _left_or_right(scene):
            side = name.split()[2]
            path = f"{_number(scene)}-{first.noun}_{side}_of_{second.noun}.jpg"
            (folder / "images" / path).write_bytes((folder / "images" / _name(scene)).read_bytes())
            other = "right" if side == "left" else "left"
            captions = [f"A {first.noun} to the {s} of a {second.noun}" for s in (side, other)]
            records.append({"image_path": path, "caption_options": captions})
    return AnnotationFiles("whatsup", _write(folder / "whatsup.json", records), folder / "images", {})


def _pairs(folder: Path, data: ConceptDataset, scenes: list[Example]) -> AnnotationFiles:
    """Save pairs of mirrored, recolored and exchanged photographs in a table with two images in each row."""
    images = folder / "images"
    rows = []
    for kind in ("object", "color", "relation"):
        for number, pair in enumerate(counterfactuals.balanced_pairs(data, kind, limit=len(scenes))):
            if pair.clean.candidates != YES_NO:
                continue
            name = f"{kind}{number}.png"
            pair.corrupt.image.load().save(images / name)
            rows.append(
                {
                    "clean_image": _name(pair.clean), "corrupt_image": name, "question": pair.clean.question,
                    "clean_answer": pair.clean.answer, "corrupt_answer": pair.corrupt.answer, "kind": kind,
                    "change": pair.change,
                }
            )  # fmt: skip
    file = folder / "pairs.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return AnnotationFiles("pairs", file, images, {})


FORMATS: Mapping[str, Callable[[Path, ConceptDataset, list[Example]], AnnotationFiles]] = {
    "coco": _coco,
    "gqa": _gqa,
    "visual_genome": _visual_genome,
    "vaw": _vaw,
    "pope": _pope,
    "whatsup": _whatsup,
    "pairs": _pairs,
}
"""Name of a loader to the function that writes its files."""
