"""File formats of preference data: one module and one entry of `preference_formats` each.

=====================  ===================================  ==========================================================
format                 file                                 read by
=====================  ===================================  ==========================================================
`trl`                  ``preferences.jsonl``                TRL's `DPOTrainer`; zero, one or several images
`rlaif_v`              ``preferences.parquet``              RLAIF-V's code; images are in the file; needs pyarrow
`csr`                  ``preferences.json``                 the code of CSR and POVID
`ha_dpo_pope`          ``pope_data.json``                   HA-DPO's code; questions with answers
`ha_dpo_descriptions`  ``desc_data.json``                   HA-DPO's code; descriptions without prompts
=====================  ===================================  ==========================================================

Images are written to the folder ``images`` next to the file, named by their content, and files refer to them by relative paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundscope.core.errors import ConfigError, DataError
from groundscope.core.registry import Registry
from mitigation.preference.data import PreferenceData
from mitigation.preference.formats import csr, ha_dpo_descriptions, ha_dpo_pope, rlaif_v, trl

__all__ = ["PreferenceFormat", "preference_formats", "read_preferences", "write_preferences"]


@dataclass(frozen=True)
class PreferenceFormat:
    """A file format of preference data, an entry of `preference_formats`.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.preference_formats["csr"].file
    'preferences.json'
    """

    file: str
    """Name of the file that `write` makes."""
    write: Callable[..., Path]
    """``write(data, folder, **options)`` writes the file and its images, and returns the path of the file."""
    read: Callable[..., PreferenceData]
    """``read(file, images, **options)`` reads a file whose images are in a folder."""


def _problem(entry: PreferenceFormat) -> str | None:
    if not isinstance(entry, PreferenceFormat) or not callable(entry.write) or not callable(entry.read):
        return "it must be a mitigation.PreferenceFormat with functions that write and read a file"
    return None


preference_formats: Registry[PreferenceFormat] = Registry(
    "preference format",
    {
        module.__name__.rpartition(".")[2]: PreferenceFormat(module.FILE, module.write, module.read)
        for module in (trl, rlaif_v, csr, ha_dpo_pope, ha_dpo_descriptions)
    },
    group="groundscope.preference_formats",
    check=_problem,
)
"""Formats by name; add one with ``preference_formats.register(name, PreferenceFormat(...))`` or an entry point."""


def write_preferences(data: PreferenceData, folder: Path | str, form: str = "trl", **options: Any) -> Path:
    """Write preference data and their images into a folder.

    Parameters
    ----------
    data
        The pairs.
    folder
        Folder of the file and of ``images``; it is made if it does not exist.
    form
        Name of the format, of `preference_formats`.
    options
        Options of the format: ``variant`` of the HA-DPO forms.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        For an unknown format, and for options that it does not have.
    DataError
        For no pairs, pairs that the format cannot represent, and images that cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import groundscope as gs
    >>> example = gs.scenes.dataset(10).where(split="conflict", kind="what_color")[0]
    >>> pair = gs.PreferencePair.of(example, example.answer, example.prior_answer, source="labels")
    >>> file = gs.write_preferences(gs.PreferenceData("one", (pair,)), tempfile.mkdtemp(), "csr")
    >>> gs.read_preferences(file, "csr")[0].chosen == example.answer
    True
    """
    entry = preference_formats[form]
    if not len(data):
        msg = f"preferences '{data.name}' have no pairs to write"
        raise DataError(msg)
    _check_options(form, options)
    return entry.write(data, Path(folder), **options)


def read_preferences(
    file: Path | str, form: str = "trl", images: Path | str | None = None, **options: Any
) -> PreferenceData:
    """Read preference data.

    Parameters
    ----------
    file
        The file.
    form
        Name of the format, of `preference_formats`.
    images
        Folder to which the paths of images are relative; None for that of the file.
    options
        Options of the format.

    Raises
    ------
    ConfigError
        For an unknown format, and for options that it does not have.
    DataError
        Names the file, record and field: for a file of another format, wrong fields, equal answers, and images that are missing,
        unreadable, or outside the folder.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> file = Path(tempfile.mkdtemp()) / "preferences.jsonl"
    >>> _ = file.write_text('{"prompt": "What is this?", "chosen": "a cat"}')
    >>> gs.read_preferences(file, "trl")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    groundscope.core.errors.DataError: ...preferences.jsonl: line 1: no field 'rejected'; it has 'prompt', 'chosen'
    """
    entry = preference_formats[form]
    _check_options(form, options)
    path = Path(file)
    return entry.read(path, path.parent if images is None else Path(images), **options)


def _check_options(form: str, options: dict[str, Any]) -> None:
    import inspect

    entry = preference_formats[form]
    names = {n for f in (entry.write, entry.read) for n in list(inspect.signature(f).parameters)[2:]}
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        msg = f"format '{form}' has no option '{unknown}'; its options: {', '.join(sorted(names)) or 'none'}"
        raise ConfigError(msg)
