"""Load questions and annotations from files as a `ConceptDataset`.

Each loader is a function of a file and the folder of its images; it reads files of any size one record at a time, names
file, record and field in its errors, checks the header of every image, and counts in the provenance what it leaves out.

Questions of a benchmark, as published:

`pope`
    POPE: is an object in the image? (object)
`amber`
    AMBER: existence, attributes and relations, and descriptions (all levels).
`mme`
    MME: the perception subtasks (all levels).

Captions, true and false, as questions:

`aro`
    ARO: relations and attributes.
`sugarcrepe`
    SugarCrepe: one fluent change (the level of the change).
`vsr`
    VSR: spatial relations.
`whatsup`
    What'sUp: one preposition (relation).

Annotations, as questions about them:

`coco`
    COCO: object categories with boxes, and captions (object).
`gqa`
    GQA: scene graphs, or its own questions (all levels).
`visual_genome`
    Visual Genome: objects, attributes, relationships and regions (all levels).
`vaw`
    VAW: attributes that an object has and does not have (attribute).
`clevr`
    CLEVR: rendered scenes (all levels).

Pairs of images:

`pairs`
    A table of two images, a question and both answers (all levels).

Your own:

`table`
    A table with images, questions, answers and any labels (all levels).

`load` calls a loader by its name; `register` adds one. Loaders of installed packages are found by the entry-point group
``groundscope.loaders``.
"""

# A loader has the name of its module: with a lazy import, ``loaders.pope`` would be the module after the first import of
# that. The modules import quickly, so all are imported here.

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from concepts.loaders.amber import amber
from concepts.loaders.aro import aro
from concepts.loaders.clevr import clevr
from concepts.loaders.coco import coco
from concepts.loaders.gqa import gqa
from concepts.loaders.mme import mme
from concepts.loaders.pairs import pairs
from concepts.loaders.pope import pope
from concepts.loaders.sugarcrepe import sugarcrepe
from concepts.loaders.table import table
from concepts.loaders.vaw import vaw
from concepts.loaders.visual_genome import visual_genome
from concepts.loaders.vsr import vsr
from concepts.loaders.whatsup import whatsup
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.registry import Registry
from groundscope.core.text import nearest

__all__ = [
    "LOADERS",
    "Loader",
    "amber",
    "aro",
    "clevr",
    "coco",
    "gqa",
    "images_optional",
    "load",
    "mme",
    "option_names",
    "pairs",
    "pope",
    "register",
    "sugarcrepe",
    "table",
    "vaw",
    "visual_genome",
    "vsr",
    "whatsup",
]

Loader = Callable[..., ConceptDataset]
"""Function of a file and the folder of its images, both paths, and of options, which may include ``limit``."""


def _problem(loader: Loader) -> str | None:
    """Return why an entry is not a loader, or None."""
    advice = "it must be a function (file, images, **options) that returns a ConceptDataset"
    if not callable(loader):
        return advice
    try:
        inspect.signature(loader).bind_partial(Path(), Path())
    except (TypeError, ValueError) as error:
        return f"{advice}: {error}"
    return None


LOADERS: Registry[Loader] = Registry(
    "loader",
    {
        "amber": amber,
        "aro": aro,
        "clevr": clevr,
        "coco": coco,
        "gqa": gqa,
        "mme": mme,
        "pairs": pairs,
        "pope": pope,
        "sugarcrepe": sugarcrepe,
        "table": table,
        "vaw": vaw,
        "visual_genome": visual_genome,
        "vsr": vsr,
        "whatsup": whatsup,
    },
    group="groundscope.loaders",
    check=_problem,
)
"""Loaders by name: built-in, registered, and of installed packages."""


def register(name: str, loader: Loader, *, replace: bool = False) -> None:
    """Add a loader, for `load` and for ``data.source=name`` of the command.

    An installed package does the same with an entry point in the group ``groundscope.loaders``.

    Parameters
    ----------
    name
        Name of the format.
    loader
        Function ``(file, images, **options)`` that returns a `ConceptDataset`.
    replace
        Whether to replace an existing loader of that name.

    Raises
    ------
    ConfigError
        If the name is in use and `replace` is False, or `loader` is not a function of two paths.

    Examples
    --------
    >>> import groundscope as gs
    >>> def empty(file, images, *, size=0):
    ...     return gs.ConceptDataset("empty", ())
    >>> gs.loaders.register("empty", empty)
    >>> len(gs.loaders.load("empty", "file.json", "images")), gs.loaders.option_names("empty")
    (0, ('size',))
    >>> gs.loaders.LOADERS.unregister("empty")
    """
    LOADERS.register(name, loader, replace=replace)


def option_names(name: str) -> tuple[str, ...]:
    """Return the names of a loader's options: its parameters after the file and the folder of images.

    Raises
    ------
    ConfigError
        For an unknown loader, or one of an installed package that cannot be loaded.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.loaders.option_names("coco")
    ('captions', 'outlines', 'per_image', 'seed', 'limit')
    """
    return tuple(_options(LOADERS[name]))


def images_optional(name: str) -> bool:
    """Whether a loader runs without a folder of images.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.loaders.images_optional("table"), gs.loaders.images_optional("coco")
    (True, False)
    """
    parameters = list(inspect.signature(LOADERS[name]).parameters.values())
    return len(parameters) > 1 and parameters[1].default is not inspect.Parameter.empty


def load(
    name: str, file: Path | str, images: Path | str | None = None, /, *, limit: int | None = None, **options: Any
) -> ConceptDataset:
    """Load a dataset with a loader that is given by name.

    Parameters
    ----------
    name
        An entry of `LOADERS`.
    file
        File of questions or annotations.
    images
        Folder of its images; may be omitted for `table`, whose images can be next to the file or in it.
    limit
        As documented by the loader; for a loader without this option, the maximum number of questions.
    options
        Options of the loader (`option_names`).

    Returns
    -------
    ConceptDataset
        The provenance names the loader and, for a loader of an installed package, its distribution.

    Raises
    ------
    ConfigError
        For an unknown loader, one of an installed package that cannot be loaded, an unknown option, or a missing one.
    DataError
        As the loader does; also if it returns anything but a `ConceptDataset`.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> row = {"question_id": 1, "image": "a.png", "text": "Is there a pear in the image?", "label": "yes"}
    >>> _ = (folder / "questions.jsonl").write_text(json.dumps(row))
    >>> data = gs.loaders.load("pope", folder / "questions.jsonl", folder)
    >>> data[0].question, data[0].answer, data.provenance["loader"]
    ('Is there a pear in the image?', 'yes', 'pope')
    """
    loader = LOADERS[name]
    available = _options(loader)
    any_option = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(loader).parameters.values())
    names = [option for option in available if option != "limit"]
    unknown = [option for option in options if option not in names and not any_option]
    if unknown:
        choices = f"choose from {', '.join(names)}{nearest(unknown[0], names)}" if names else "it has no options"
        msg = f"loader '{name}' has no option '{unknown[0]}'; {choices}"
        raise ConfigError(msg)
    missing = [n for n, p in available.items() if p.default is p.empty and n not in options and n != "limit"]
    if missing:
        msg = f"loader '{name}' needs the option '{missing[0]}'; its options are {', '.join(names)}"
        raise ConfigError(msg)
    has_limit = any_option or "limit" in available
    if images is None and not images_optional(name):
        msg = f"loader '{name}' needs the folder of the images"
        raise ConfigError(msg)
    folder = () if images is None else (Path(images),)
    data = loader(Path(file), *folder, **options, **({"limit": limit} if has_limit else {}))
    if not isinstance(data, ConceptDataset):
        msg = f"loader '{name}' returned an object of type {type(data).__name__}; it must return a ConceptDataset"
        raise DataError(msg)
    if not has_limit and limit is not None:
        data = data[:limit]
    origin = {"loader_package": LOADERS.origins[name]} if name in LOADERS.origins else {}
    return replace_fields(data, provenance={"loader": name, **data.provenance, **origin})


def _options(loader: Loader) -> dict[str, inspect.Parameter]:
    """Return the parameters of a loader after the file and the folder of images, by name."""
    parameters = inspect.signature(loader).parameters.values()
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return {p.name: p for p in list(parameters)[2:] if p.kind not in variable}
