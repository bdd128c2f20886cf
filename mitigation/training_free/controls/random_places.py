"""Random heads and layers, for controls of methods that act on some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuits import random_heads
from groundscope.core.errors import ConfigError
from lvlm.sites import parse_heads
from mitigation.training_free.seeds import generator_of

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from lvlm.sites import Head


def other_heads(model: Lvlm, heads: Sequence[Head | str], seed: int = 0) -> tuple[Head, ...]:
    """Return as many random heads of the decoder that are not among some heads.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_places import other_heads
    >>> len(other_heads(gs.load_lvlm("tiny"), ["L3.H1", "L4.H7"]))
    2
    """
    parsed = parse_heads(heads)
    return random_heads((model.n_layers, model.n_heads), len(parsed), exclude=parsed, seed=seed)


def other_layers(model: Lvlm, layers: Sequence[int], seed: int = 0) -> tuple[int, ...]:
    """Return as many random layers of the decoder that are not among some layers, in order.

    Raises
    ------
    ConfigError
        If the model has fewer other layers.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_places import other_layers
    >>> len(set(other_layers(gs.load_lvlm("tiny"), [1, 2])) - {1, 2})
    2
    """
    others = [layer for layer in range(model.n_layers) if layer not in set(layers)]
    if len(others) < len(set(layers)):
        msg = (
            f"the control needs {len(set(layers))} other layers, but the model has only {model.n_layers} in all; choose at most "
            "half of the layers"
        )
        raise ConfigError(msg)
    random_layers = generator_of(seed, "layers").choice(others, len(set(layers)), replace=False)
    return tuple(sorted(int(layer) for layer in random_layers))
