"""Check that a model's scores are finite: argmax of NaN returns the first index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from groundscope.core.errors import ModelError


def check_finite(values: Tensor | np.ndarray, names: Sequence[str], model: str) -> None:
    """Raise `ModelError` if scores or logits are not finite.

    Parameters
    ----------
    values
        Scores ``[n, …]``; rows with NaN or an infinite value are errors. For full logits pass their ``logsumexp``, because models
        may assign minus infinity to some tokens.
    names
        Name of each row in messages, such as ``example 'a'``; ``[n]``.
    model
        Name of the model.
    """
    array = values.detach().cpu().float().numpy() if isinstance(values, Tensor) else np.asarray(values)
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        msg = f"{names[int(bad.argmax())]}: the logits of {model} are not finite; steer less, or load the model in float32"
        raise ModelError(msg)
