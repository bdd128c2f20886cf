"""Numbers of a model that must be finite before a choice is made from them: the largest of several NaN is the first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from groundscope.core.errors import ModelError


def check_finite(values: Tensor | np.ndarray, names: Sequence[str], model: str) -> None:
    """Raise `ModelError` where a model's scores or logits are not finite.

    Parameters
    ----------
    values
        Any shape ``[n, …]``; a row with a NaN or an infinity is refused. Of whole logits give their ``logsumexp``, as a
        model may give some tokens a logit of minus infinity.
    names
        What each row is of, as the message names it: ``example 'a'``, ``pair 'a', 'b'``; ``[n]``.
    model
        The model's name.
    """
    array = values.detach().cpu().float().numpy() if isinstance(values, Tensor) else np.asarray(values)
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        msg = f"{names[int(bad.argmax())]}: the logits of {model} are not finite; steer less, or load it in float32"
        raise ModelError(msg)
