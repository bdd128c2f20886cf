"""Write the chosen vector in the formats of other software, and note which formats cannot represent it."""

from __future__ import annotations

import inspect
from pathlib import Path

from experiments.run.context import Context
from experiments.run.folder import write_json
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.paths import is_file
from groundscope.core.text import nearest
from mitigation import SteeringVector, exports


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown format."""
    for name in context.config.export.formats or ():
        if name not in exports:
            msg = f"export.formats: unknown format '{name}'; choose from {', '.join(exports)}{nearest(name, exports)}"
            raise ConfigError(msg)


def make_exports(context: Context, root: Path) -> str:
    """Write the chosen vector in every requested format that can represent it; note the reasons for the others."""
    options = context.config.export
    source = context.folder.path / "steering" / "vector.safetensors"
    if not is_file(source):
        write_json(root / "formats.json", {"written": {}, "refused": {}})
        return "nothing to write: no vector was made"
    vector = SteeringVector.load(source)
    if vector.strength == 0:
        write_json(root / "formats.json", {"written": {}, "refused": {}})
        return "nothing to write: no strength made fewer errors within the allowed cost, so the vector is not applied"
    written: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in exports.usable() if options.formats is None else options.formats:
        form = exports[name]
        reasons = form.capability.obstacles(vector)
        more = {"convert": True} if options.convert and "convert" in inspect.signature(form.write).parameters else {}
        if reasons and not more:
            refused[name] = "; ".join(reasons)
            continue
        stem = "vector" if name in ("safetensors", "gguf") else name
        path = root / f"{stem}{form.suffix}"
        try:
            form.write(vector, path, context.model, **more)
        except ImportError:
            refused[name] = f"its package is not installed: pip install 'groundscope[{name}]'"
        except GroundscopeError as error:
            refused[name] = str(error)
        else:
            written[name] = path.name
    origins = {name: exports.origins[name] for name in written if name in exports.origins}
    record = {"written": written, "refused": refused} | ({"origins": origins} if origins else {})
    write_json(root / "formats.json", record)
    summary = f"written: {', '.join(f'{name} ({file})' for name, file in written.items()) or 'nothing'}"
    return f"{summary}; cannot represent it: {', '.join(refused)} (reasons: formats.json)" if refused else summary
