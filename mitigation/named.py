"""A mitigation from one text: a method of the table with its parameters, or the file of a steering vector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from mitigation.protocol import Mitigation

_FILE = ".safetensors"


def check_mitigation_name(text: str) -> None:
    """Raise `ConfigError` if a text names no mitigation that needs neither data nor activations; no model is needed.

    Examples
    --------
    >>> from mitigation.named import check_mitigation_name
    >>> check_mitigation_name("vcd(alpha=0.5)")
    """
    from mitigation.arena.rows import parse_row
    from mitigation.training_free.registry import training_free_methods

    if text.endswith(_FILE):
        if not Path(text).is_file():
            msg = f"mitigation '{text}': the file does not exist"
            raise ConfigError(msg)
        return
    name, _ = parse_row(text)
    needs = training_free_methods[name].needs if name in training_free_methods else ("examples", "activations")
    if needs:
        msg = (
            f"mitigation '{text}' is derived from {' and '.join(needs)}; derive it in a run, and give the file of its vector "
            f"(steering/vector{_FILE}), or name a method that needs none, such as vcd"
        )
        raise ConfigError(msg)


def named_mitigation(text: str, model: Lvlm) -> Mitigation:
    """Return the mitigation of a name with parameters, such as ``vcd(alpha=0.5)``, or of a steering vector's file.

    Parameters
    ----------
    text
        A training-free method that is derived from nothing (`mitigation.training_free_methods`), with parameters that differ
        from the published ones; or the path of a file that `SteeringVector.save` wrote.
    model
        The model that it will be applied to.

    Raises
    ------
    ConfigError
        For an unknown method or parameter, a method that is derived from data, or a missing file.
    ModelError
        If it cannot be applied to the model.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.named_mitigation("vcd(alpha=0.5)", gs.load_lvlm("tiny")).name
    'VCD (alpha=0.5)'
    """
    from mitigation.arena.rows import parse_row
    from mitigation.method_data import DerivationData
    from mitigation.steering.vector import SteeringVector
    from mitigation.training_free.registry import training_free_methods

    check_mitigation_name(text)
    if text.endswith(_FILE):
        mitigation: Mitigation = SteeringVector.load(text)
    else:
        name, parameters = parse_row(text)
        data = DerivationData(model, None, ConceptDataset("none", ()))
        mitigation = training_free_methods[name].derive(data, **parameters)
    mitigation.check(model)
    return mitigation
