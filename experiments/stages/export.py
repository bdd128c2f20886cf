"""Write the chosen vectors in the formats of other software, with loaders to copy, and note what a format cannot represent."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.steer import EXPORTABLE
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.files import write_text
from groundscope.core.paths import is_file
from groundscope.core.text import nearest
from mitigation import SteeringVector, exports
from mitigation.steering.export import apply_bias, apply_vector

BEST, OTHER = "best", "exportable"
"""Names of the two vectors."""


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown format."""
    for name in context.config.export.formats or ():
        if name not in exports:
            msg = f"export.formats: unknown format '{name}'; choose from {', '.join(exports)}{nearest(name, exports)}"
            raise ConfigError(msg)


def make_exports(context: Context, root: Path) -> str:
    """Write every requested format with the first vector that it can represent: the best one, or else the exportable one."""
    options = context.config.export
    steering = context.folder.path / "steering"
    files = {BEST: steering / "vector.safetensors", OTHER: steering / EXPORTABLE}
    loaded = {which: SteeringVector.load(file) for which, file in files.items() if is_file(file)}
    vectors = {which: vector for which, vector in loaded.items() if vector.strength}
    if not vectors:
        write_json(root / "formats.json", {"written": {}, "refused": {}})
        reason = "no strength made fewer errors within the allowed cost, so the vector is not applied"
        return f"nothing to write: {reason if loaded else 'no vector was made'}"
    written: dict[str, str] = {}
    refused: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in exports.usable() if options.formats is None else options.formats:
        which, path, reason = _write(context, root, name, vectors)
        if reason:
            refused[name] = reason
        else:
            written[name], origin[name] = path.name, which
    if "safetensors" in written and origin["safetensors"] == BEST and OTHER in vectors:
        path = exports["safetensors"].write(vectors[OTHER], root / EXPORTABLE, context.model)
        written["safetensors, exportable"], origin["safetensors, exportable"] = path.name, OTHER
    origins = {name: exports.origins[name] for name in written if name in exports.origins}
    record = {"written": written, "refused": refused, "vectors": origin} | ({"origins": origins} if origins else {})
    write_json(root / "formats.json", record)
    _write_loaders(root, written, origin, vectors)
    summary = f"written: {', '.join(f'{name} ({file})' for name, file in written.items()) or 'nothing'}"
    return f"{summary}; cannot represent it: {', '.join(refused)} (reasons: formats.json)" if refused else summary


def _write(context: Context, root: Path, name: str, vectors: Mapping[str, SteeringVector]) -> tuple[str, Path, str]:
    """Write one format; return the name of the vector, the path, and the reason if nothing was written."""
    form, which, reason = exports[name], "", ""
    path = root / f"{'vector' if name in ('safetensors', 'gguf') else name}{form.suffix}"
    more: dict[str, Any] = {}
    if context.config.export.convert and "convert" in inspect.signature(form.write).parameters:
        more = {"convert": True}
    for which, vector in vectors.items():
        obstacles = form.capability.obstacles(vector)
        problem = "; ".join(obstacles)
        if not obstacles or more:
            try:
                form.write(vector, path, context.model, **more)
            except ImportError:
                return which, path, "a package that it needs is not installed"
            except GroundscopeError as error:
                problem = str(error)
            else:
                return which, path, ""
        reason = problem  # in the end that of the exportable vector, which is made for other software
    return which, path, reason


def _write_loaders(
    root: Path, written: Mapping[str, str], origin: Mapping[str, str], vectors: Mapping[str, SteeringVector]
) -> None:
    """Copy the loaders that need no groundscope, and describe every file."""
    lines = ["# Corrections of this run", ""]
    lines += [f"- {which}: {vector.name}, for `{vector.model}`" for which, vector in vectors.items()]
    if "safetensors" in written:
        shutil.copyfile(apply_vector.__file__, root / "apply_vector.py")
        lines += [
            "",
            "Apply a vector to the model of transformers, with torch and safetensors only:",
            "",
            "```python",
            "from apply_vector import steer",
            f'with steer(model, "{written["safetensors"]}"):',
            "    output = model.generate(**inputs)",
            "```",
        ]
    if "baked" in written:
        shutil.copyfile(apply_bias.__file__, root / "apply_bias.py")
        lines += [
            "",
            "Or add it to the model's biases, once:",
            "",
            "```python",
            "from apply_bias import apply",
            f'undo = apply(model, "{written["baked"]}")',
            "```",
        ]
    lines += ["", "| format | file | vector | read by |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {file} | {origin[name]} | {exports[name.split(',')[0]].capability.consumer} |"
        for name, file in written.items()
    ]
    write_text(root / "README.md", "\n".join(lines) + "\n")
