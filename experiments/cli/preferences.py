"""``groundscope preferences`` and ``groundscope tune``: from the diagnoses of a run to preference files, and to a tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.terminal_text import plain_console
from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

if TYPE_CHECKING:
    from experiments.config import RunConfig
    from mitigation import PreferenceData

_MAKER = {"verdicts": "overridden", "anchors": "1", "seed": "0"}
"""Options of both commands, with their defaults."""
_VERDICTS = {"overridden", "wrong"}
MODEL = "model"
"""Folder of the tuned model inside that of its adapter."""


@dataclass(frozen=True)
class _Request:
    """A run, options of the command, and options that change the configuration of the run."""

    run: Path
    options: dict[str, str]
    words: tuple[str, ...]


def write(arguments: Sequence[str]) -> int:
    """Write the overridden answers of a run as preference files.

    Parameters
    ----------
    arguments
        The run; ``out=FOLDER``, ``format=`` a name of `mitigation.preference_formats` (by default ``trl``), ``variant=`` of the
        HA-DPO formats, ``verdicts=overridden|wrong``, ``anchors=`` pairs of right answers for each wrong one, ``seed=``.

    Raises
    ------
    ConfigError, DataError
        For wrong options, a run without diagnoses, and pairs that the format cannot represent.
    """
    from mitigation import preference_formats, write_preferences

    request = _read(arguments, {**_MAKER, "out": "", "format": "trl", "variant": ""}, "preferences")
    form = request.options["format"]
    preference_formats[form]  # raises for an unknown format before the data are loaded
    data, _ = _pairs(request)
    out = Path(request.options["out"] or f"preferences/{request.run.name}")
    more = {"variant": request.options["variant"]} if request.options["variant"] else {}
    file = write_preferences(data, out, form, **more)
    console = plain_console()
    console.print(repr(data), markup=False)
    console.print(f"written: {file}", markup=False)
    return 0


def tune(arguments: Sequence[str]) -> int:
    """Tune the model of a run on its overridden answers, and write the adapter and the tuned model.

    Parameters
    ----------
    arguments
        The run; ``out=FOLDER``, options of `write` that make the pairs, and fields of `mitigation.TuneOptions`
        (``learning_rate=1e-4``).

    Raises
    ------
    ConfigError, DataError, ModelError
        For wrong options, a run without diagnoses, and a model that cannot be tuned.
    """
    from rich.console import Console

    from experiments.run.context import Context
    from experiments.run.folder import RunFolder
    from mitigation import TuneOptions
    from mitigation import tune as train

    own = {f.name: str(f.default) for f in fields(TuneOptions) if f.name != "seed"}
    request = _read(arguments, {**_MAKER, "out": "", **own, "targets": ""}, "tune")
    options = TuneOptions(**{f.name: _value(f.name, request.options[f.name], f.default) for f in fields(TuneOptions)})
    out = Path(request.options["out"] or f"tuned/{request.run.name}")
    if (out / MODEL).exists():
        msg = f"'{out / MODEL}' exists; choose another folder with out=FOLDER"
        raise ConfigError(msg)
    data, config = _pairs(request)
    folder = RunFolder(request.run, Path(config.root))
    model = Context(config, folder, Console(stderr=True)).model
    tuning = train(model, data, options, out=out)
    tuning.adapter.save_merged(model, out / MODEL)
    console = plain_console()
    console.print(repr(data), markup=False)
    for epoch in tuning.history:
        mark = "  <- chosen" if epoch.number == tuning.epoch else ""
        console.print(
            f"epoch {epoch.number}: validation loss {epoch.validation_loss:.4f}, chosen answer more probable "
            f"{100 * epoch.validation_accuracy:.1f} %{mark}",
            markup=False,
        )
    console.print(f"adapter: {out}\ntuned model: {out / MODEL}", markup=False)
    console.print(
        f"to see what changed inside: groundscope resume={request.run} is the run before; run the tuned model with "
        f"model=hf model.path={out / MODEL} and the same data, then groundscope compare both runs page=changes.html",
        markup=False,
    )
    return 0


def _read(arguments: Sequence[str], defaults: dict[str, str], command: str) -> _Request:
    runs = [a for a in arguments if "=" not in a]
    if len(runs) != 1:
        msg = f"groundscope {command} takes one run with diagnoses, such as runs/default; it received {len(runs)}"
        raise ConfigError(msg)
    options, words = dict(defaults), []
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if separator and "." in name:
            words.append(argument)  # an option of the run, such as data.source
        elif separator and name not in defaults:
            msg = f"groundscope {command} has no option '{name}'; choose from {', '.join(defaults)}{nearest(name, defaults)}"
            raise ConfigError(msg)
        elif separator:
            options[name] = value
    if options["verdicts"] not in _VERDICTS:
        msg = f"verdicts={options['verdicts']}; choose overridden (the truth is decodable) or wrong (all wrong answers)"
        raise ConfigError(msg)
    return _Request(Path(runs[0]), options, tuple(words))


def _pairs(request: _Request) -> tuple[PreferenceData, RunConfig]:
    """Return the pairs of a run's diagnoses, and the configuration of the run."""
    from diagnosis import preference_pairs
    from diagnosis.preference_pairs import OVERRIDES
    from experiments.cli.resume import configured
    from experiments.data import load_parts
    from experiments.results.run_files import RunFiles

    config = configured(request.run, request.words)
    diagnoses = RunFiles(request.run).diagnoses
    if diagnoses is None:
        msg = (
            f"the run '{request.run}' has no diagnoses: groundscope resume={request.run} stages=[examples,trace,diagnose] "
            "diagnose.limit=2000"
        )
        raise ConfigError(msg)
    verdicts = OVERRIDES if request.options["verdicts"] == "overridden" else None
    anchors = _value("anchors", request.options["anchors"], 0.0)
    seed = _value("seed", request.options["seed"], 0)
    data = preference_pairs(diagnoses, load_parts(config.data)[0], verdicts=verdicts, anchors=anchors, seed=seed)
    return data, config


def _value(name: str, text: str, default: Any) -> Any:
    """Return an option's text as a value of the type of its default; raises `ConfigError` if it has another type."""
    if isinstance(default, tuple):
        return tuple(word.strip() for word in text.strip("[]()").split(",") if word.strip())
    if isinstance(default, str):
        return text
    try:
        return type(default)(text)
    except ValueError as error:
        kind = "a whole number" if isinstance(default, int) else "a number"
        msg = f"{name}={text}; give {kind}"
        raise ConfigError(msg) from error
