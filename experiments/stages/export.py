"""The files that other code loads the correction from, and why there are not more of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from experiments.run.context import Context
from experiments.run.folder import write_json
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.paths import is_file
from mitigation import SteeringVector, export

FILES: Mapping[str, str] = MappingProxyType(
    {"safetensors": "vector.safetensors", "baked": "baked.safetensors", "gguf": "vector.gguf"}
)
"""Format to the name of its file; ``<format>.pt`` for the others."""


def check(context: Context) -> None:
    """Raise `ConfigError` for a format that there is not."""
    unknown = [name for name in context.config.export.formats or () if name not in export.FORMATS]
    if unknown:
        msg = f"export.formats={unknown}: there are {', '.join(export.FORMATS)}"
        raise ConfigError(msg)


def make_exports(context: Context, root: Path) -> str:
    """Write the chosen vector in every format that was asked for and can hold it; note why the others cannot."""
    options = context.config.export
    made = context.folder.path / "steering" / "vector.safetensors"
    if not is_file(made):
        write_json(root / "formats.json", {"written": {}, "refused": {}})
        return "nothing to write: no vector was made"
    vector = SteeringVector.load(made)
    if vector.strength == 0:
        write_json(root / "formats.json", {"written": {}, "refused": {}})
        return "nothing to write: no strength made fewer errors within the allowed cost, so the vector is not applied"
    written: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in export.FORMATS if options.formats is None else options.formats:
        form = export.FORMATS[name]
        reasons = form.ability.obstacles(vector)
        more = {"convert": True} if options.convert and "convert" in inspect.signature(form.write).parameters else {}
        if reasons and not more:
            refused[name] = "; ".join(reasons)
            continue
        path = root / FILES.get(name, f"{name}.pt")
        try:
            form.write(vector, path, context.model, **more)
        except ImportError:
            refused[name] = f"its package is not installed: pip install 'groundscope[{name}]'"
        except GroundscopeError as error:
            refused[name] = str(error)
        else:
            written[name] = path.name
    write_json(root / "formats.json", {"written": written, "refused": refused})
    told = f"written: {', '.join(f'{name} ({file})' for name, file in written.items()) or 'nothing'}"
    return f"{told}; cannot hold it: {', '.join(refused)} (why: formats.json)" if refused else told
