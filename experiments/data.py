"""The data of a run: scenes, or the files of the user, in two parts without common images."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from concepts.combination import combine_datasets
from concepts.schema import ConceptDataset
from experiments.config import DataConfig, RunConfig
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_count, nearest

_SPLITS = ("random", "popular", "adversarial")
"""Words in the names of POPE's files, which differ in nothing else within one data set."""


def describe_data(data: DataConfig) -> str:
    """Return the data of a run in a few words."""
    if is_scenes(data):
        return f"{data.n_images} + {format_count(data.test_images, 'scene')}"
    files = _list(data.questions)
    if not files:
        return ", ".join(map(str, _list(data.source)))
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {format_count(len(files) - 1, 'more file')}"


def data_problem(data: DataConfig) -> str | None:
    """Return what is wrong with the options of the data, as far as it can be known before a file is read; or None."""
    from concepts import loaders
    from concepts.loaders import images_optional

    for name in ("source", "questions", "images"):
        value = getattr(data, name)
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(t, str) or (t is None and value is None) for t in texts):
            return f"data.{name} must be a text or a list of texts, such as data.{name}=[A,B], not {value!r}"
    sources, files, folders = _list(data.source), _list(data.questions), _list(data.images)
    names = ["scenes", *loaders.LOADERS]
    for source in sources:
        if source not in names and not is_function(source):
            return (
                f"data.source={source}: choose from {', '.join(names)}{nearest(source, names)}, or name your own function as "
                "package.module:function or file.py:function"
            )
    if sources == ["scenes"]:
        return None
    if "scenes" in sources:
        return "data=[…,scenes,…]: scenes are drawn, not read from files; run them in a run of their own"
    if len(sources) > 1 and len(sources) != len(files):
        return (
            f"{format_count(len(sources), 'format')} ({', '.join(sources)}) for {format_count(len(files), 'file')}: "
            "give one file of data.questions for each"
        )
    if len(folders) > 1 and len(folders) != len(files):
        return (
            f"data.images has {format_count(len(folders), 'folder')} for {format_count(len(files), 'file')}: give one "
            "for each file, or one for all"
        )
    needs = next((s for s in sources if not is_function(s) and not (files and (folders or images_optional(s)))), None)
    if needs is not None:
        return f"data={needs} needs data.questions=FILE" + ("" if images_optional(needs) else " and data.images=FOLDER")
    if len(set(zip(sources * (len(files) // len(sources)), files, strict=True))) < len(files):
        return f"data.questions=[{','.join(files)}] names a file twice: name each file once"
    if "limit" in data.loader:
        return "data.loader.limit: set data.limit"
    if len(sources) > 1:
        wrong = next((k for k, v in data.loader.items() if k not in sources or not isinstance(v, dict)), None)
        if wrong is not None:
            return (
                f"data.loader.{wrong}: with several formats write the format first, +data.loader.{sources[0]}.{wrong}=…"
            )
    return None


def is_scenes(data: DataConfig) -> bool:
    """Return whether the data are icon scenes."""
    return _list(data.source) == ["scenes"]


def has_own_labels(data: DataConfig) -> bool:
    """Return whether the data may have labels with free names: a table or a function of the user."""
    return any(source == "table" or is_function(source) for source in _list(data.source))


def is_function(source: object) -> bool:
    """Return whether a source names a function of the user, ``module:function``."""
    return isinstance(source, str) and ":" in source


def load_parts(data: DataConfig) -> tuple[ConceptDataset, ConceptDataset]:
    """Return discovery and test examples; no group is in both.

    Raises
    ------
    ConfigError, DataError
        If the data cannot be loaded or divided.
    """
    problem = data_problem(data)
    if problem is not None:
        raise ConfigError(problem)
    if is_scenes(data):
        if data.seed == data.test_seed:
            msg = f"data.seed and data.test_seed are both {data.seed}: test scenes must differ from discovery scenes"
            raise ConfigError(msg)
        parts = _scenes(data.n_images, data.seed), _scenes(data.test_images, data.test_seed)
    else:
        parts = _divided(load_files(data), data.test_share, data.seed)
    if data.choices is not None:
        parts = _with_choices(parts, data.choices)
    first, second = (part.with_prompt(suffix=data.suffix, system=data.system) for part in parts)
    return first, second


def probe_data(config: RunConfig) -> DataConfig:
    """Return the data that the probes of a diagnosis are fitted to, as options of data; raises `ConfigError` for wrong ones."""
    options, data = config.diagnose, config.data
    if options.fit is None:
        wrong = next((n for n in ("questions", "images", "limit", "loader") if getattr(options, f"fit_{n}")), None)
        if wrong is not None:
            msg = f"diagnose.fit_{wrong} needs diagnose.fit=FORMAT, such as diagnose.fit=coco"
            raise ConfigError(msg)
        return data
    other = replace(
        data, source=options.fit, questions=options.fit_questions, images=options.fit_images, limit=options.fit_limit,
        loader=dict(options.fit_loader), test_share=0, seed=data.seed + is_scenes(DataConfig(source=options.fit)),
    )  # fmt: skip
    problem = data_problem(other)
    if problem is not None:
        names = ("questions", "images", "loader", "limit", "source")
        for name in names:
            problem = problem.replace(f"data.{name}", "diagnose.fit" if name == "source" else f"diagnose.fit_{name}")
        raise ConfigError(problem.replace("data=", "diagnose.fit="))
    return other


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


@lru_cache(4)
def _scenes(n_images: int, seed: int) -> ConceptDataset:
    """Return the questions about icon scenes; jobs of a sweep that run in one process draw the same scenes once."""
    from concepts import scenes

    return scenes.dataset(n_images, seed)


def _with_choices(
    parts: tuple[ConceptDataset, ConceptDataset], choices: Sequence[str]
) -> tuple[ConceptDataset, ConceptDataset]:
    try:
        with_open = [any(not e.candidates and e.kind != "caption" for e in part) for part in parts]
        if not any(with_open):
            parts[0].with_choices(choices)  # raises
        first, second = (
            p.with_choices(choices) if has_open else p for p, has_open in zip(parts, with_open, strict=True)
        )
    except DataError as error:
        msg = f"data.choices: {error}"
        raise ConfigError(msg) from error
    return first, second


def load_files(data: DataConfig) -> ConceptDataset:
    """Load the files of the user, each with the loader of its format, and combine them if there are several."""
    from concepts.counterfactuals import on_canvas
    from concepts.counterfactuals.photographs.canvas import parse_canvas

    sources, files, folders = _list(data.source), _list(data.questions), _list(data.images)
    count = max(len(files), 1)
    several = len(sources) > 1
    loaded = []
    for i in range(count):
        source = sources[i] if several else sources[0]
        options = data.loader.get(source, {}) if several else data.loader
        if source == "pairs" and data.canvas is not None:
            options = {"equal_size": False, **options}  # the canvas makes them equal
        file = files[i] if files else None
        folder = (folders[i] if len(folders) > 1 else folders[0]) if folders else None
        loaded.append(_load_one(source, file, folder, data.limit, options))
    whole = loaded[0] if count == 1 else combine_datasets(_named(files, sources, loaded))
    return whole if data.canvas is None else on_canvas(whole, parse_canvas(data.canvas))


def _load_one(
    source: str, file: str | None, folder: str | None, limit: int | None, options: dict[str, Any]
) -> ConceptDataset:
    from concepts import loaders

    if not is_function(source):
        return loaders.load(source, str(file), None if folder is None else str(folder), limit=limit, **options)
    function = user_function(source)
    paths = [Path(p) for p in (file, folder) if p is not None]
    more = {**options, **({"limit": limit} if limit is not None else {})}
    try:
        inspect.signature(function).bind(*paths, **more)
    except (TypeError, ValueError) as error:
        arguments = ", ".join([*(("data.questions", "data.images")[: len(paths)]), *more]) or "no arguments"
        msg = f"data.source={source}: the function cannot be called with {arguments}: {error}"
        raise ConfigError(msg) from error
    dataset = function(*paths, **more)
    if not isinstance(dataset, ConceptDataset):
        msg = f"data.source={source}: the function returned an object of type {type(dataset).__name__}, not a ConceptDataset"
        raise DataError(msg)
    return dataset


def user_function(source: str) -> Callable[..., Any]:
    """Import a function of the user: ``package.module:function``, or ``folder/file.py:function``.

    Raises
    ------
    ConfigError
        If the module cannot be imported or has no such function.
    """
    place, _, name = source.rpartition(":")
    module: ModuleType | None = None
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            msg = f"data.source={source}: there is no file '{place}'"
            raise ConfigError(msg)
        spec = spec_from_file_location(f"groundscope_user_data_{value_digest(str(path.resolve()))[:16]}", path)
        if spec is None or spec.loader is None:
            msg = f"data.source={source}: '{place}' is not a Python file"
            raise ConfigError(msg)
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and functions of the file look up their module
        load = partial(spec.loader.exec_module, module)
    else:
        load = partial(import_module, place)
    try:
        loaded = load()
        function = getattr(loaded if module is None else module, name, None)
    except ImportError as error:
        msg = (
            f"data.source={source}: cannot be imported: {error}; install the package, or write the path of the file, "
            "data.source=folder/file.py:function"
        )
        raise ConfigError(msg) from error
    if not callable(function):
        msg = f"data.source={source}: '{place}' has no function '{name}'"
        raise ConfigError(msg)
    return function


def _named(files: Sequence[str], sources: Sequence[str], loaded: Sequence[ConceptDataset]) -> dict[str, ConceptDataset]:
    """Return datasets by name: that of the file without the split, so that the three files of one POPE data set are one.

    Files are one data set only if they have the same format and folder and no common id.
    """
    stems = [Path(f).stem for f in files]
    bases = [_without_split(stem) if len(sources) == 1 and sources[0] == "pope" else stem for stem in stems]
    members: dict[str, list[int]] = {}
    for i, base in enumerate(bases):
        members.setdefault(base, []).append(i)
    named: dict[str, ConceptDataset] = {}
    for base, rows in members.items():
        ids = [e.id for i in rows for e in loaded[i]]
        if len(set(ids)) == len(ids):
            named[base] = _merged(base, [loaded[i] for i in rows]) if len(rows) > 1 else loaded[rows[0]]
            continue
        for i in rows:
            same = sum(name == stems[i] or name.startswith(f"{stems[i]}-") for name in named)
            named[f"{stems[i]}-{same + 1}" if same else stems[i]] = loaded[i]
    return named


def _without_split(stem: str) -> str:
    for split in _SPLITS:
        if split in stem.lower():
            start = stem.lower().index(split)
            return (stem[:start] + stem[start + len(split) :]).strip("_-. ").replace("__", "_") or stem
    return stem


def _merged(name: str, loaded: Sequence[ConceptDataset]) -> ConceptDataset:
    first = dict(loaded[0].provenance)
    provenance = {
        **({"loader": first["loader"]} if "loader" in first else {}),
        "files": [dict(d.provenance) for d in loaded],
    }
    return ConceptDataset(name, tuple(e for d in loaded for e in d), provenance)


def _divided(whole: ConceptDataset, share: float, seed: int) -> tuple[ConceptDataset, ConceptDataset]:
    """Divide a dataset by groups: the digest of its name decides for each group, independent of the other data."""
    if share in {0, 1}:
        none = whole.filter(lambda _: False)
        return (none, whole) if share else (whole, none)
    tested = {g for g in {e.group for e in whole} if int(value_digest([g, seed])[:8], 16) / 0xFFFFFFFF < share}
    first, second = whole.filter(lambda e: e.group not in tested), whole.filter(lambda e: e.group in tested)
    if not len(first) or not len(second):
        msg = f"dataset '{whole.name}' has too few images for discovery and test: add images, or change data.test_share"
        raise ConfigError(msg)
    return first, second
