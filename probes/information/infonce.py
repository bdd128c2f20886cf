"""InfoNCE, a common estimate of mutual information, as a documented baseline: it cannot exceed the log of its candidates."""

from __future__ import annotations

import math

import numpy as np

from groundscope.core.errors import ProbeError
from probes.information.problem import log_softmax


def infonce(scores: np.ndarray) -> float:
    """Return the InfoNCE estimate of a batch, in nats (van den Oord et al. 2018, arXiv 1807.03748).

    ``log N + mean_i log softmax(scores_i)_i``, a lower bound of mutual information in expectation, at most ``log N``. It is a
    baseline, not a measure of this package: with the best possible critic and Z uniform on 64 values (truth 4.159 nats) it is
    2.617, 3.878 and 4.128 at N = 16, 128 and 1024, so it depends on the batch as much as on the information.

    Parameters
    ----------
    scores
        Float [N, N]: critic of each pair of a row and a candidate; the diagonal has the true pairs.

    Raises
    ------
    ProbeError
        If the scores are not a square table of two rows or more.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import infonce
    >>> round(infonce(100 * np.eye(16)), 3), round(float(np.log(16)), 3)
    (2.773, 2.773)
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2:
        msg = f"scores of shape {list(table.shape)}: give a square table [N, N] of two rows or more"
        raise ProbeError(msg)
    return math.log(len(table)) + float(np.diag(log_softmax(table)).mean())
