"""The nonlinear family: the logits of the linear family plus those of a small MLP.

The sum contains the linear family, so a poorly fitted MLP cannot read less than the linear family does, which would pass for
lost information. It is written in torch, not scikit-learn, because the fits of all folds and penalties train side by side in one
batched matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probes.information.problem import Predictor, Problem, log_softmax

HIDDEN = 32
"""Number of hidden units."""
BATCH = 128
"""Rows of a step."""
RATE = 0.01
"""Step size of Adam."""
AVERAGE = 0.97
"""Decay of the running average of the weights, which are those that predict: single steps are noisy."""
PENALTIES, STEPS = (0.001, 0.02), (80, 300)
"""L2 penalties of the mean log-loss, and numbers of steps."""
CHOICES = tuple((penalty, steps) for penalty in PENALTIES for steps in STEPS)


def fit_nonlinear(problems: Sequence[Problem], choices: Sequence[Sequence[tuple[float, int]]]) -> list[list[Predictor]]:
    """Train an MLP with one hidden layer (GELU) for every problem and penalty, and return its state after each number of steps.

    Minimizes ``mean_i -log p(z_i | x_i) + penalty / 2 (||U||^2 + ||V||^2)`` with logits
    ``log p_base(z | x) + U gelu(V x + c) + d``, by Adam on batches drawn with replacement. `U` starts at 0.

    Parameters
    ----------
    problems
        F problems with equal numbers of features and classes.
    choices
        For each problem its (penalty, steps).
    """
    penalties = [list(dict.fromkeys(penalty for penalty, _ in of_problem)) for of_problem in choices]
    width = max(map(len, penalties))
    # Problems with fewer penalties train their first one more than once; the copies are ignored.
    decay = torch.tensor([(p + [p[0]] * width)[:width] for p in penalties], dtype=torch.float32)
    steps = sorted({steps for of_problem in choices for _, steps in of_problem})
    states = _train(problems, decay, steps)
    return [
        [_predictor(problem, states[steps], f, penalties[f].index(penalty)) for penalty, steps in of_problem]
        for f, (problem, of_problem) in enumerate(zip(problems, choices, strict=True))
    ]


def _train(problems: Sequence[Problem], decay: Tensor, steps: Sequence[int]) -> dict[int, tuple[np.ndarray, ...]]:
    """Return for each number of steps the averaged weights V [F, k, P h], c [F, P h], U [F, P, h, K] and d [F, P, K]."""
    n_problems, n_penalties = decay.shape
    k, count = problems[0].features.shape[1], problems[0].count
    sizes = torch.tensor([len(p.classes) for p in problems])
    starts = torch.cumsum(sizes, 0) - sizes
    x = torch.from_numpy(np.concatenate([p.features for p in problems]).astype(np.float32))
    z = torch.from_numpy(np.concatenate([p.classes for p in problems]).astype(np.int64))
    base = torch.from_numpy(np.concatenate([p.base(p.features) for p in problems]).astype(np.float32))
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(1, k, n_penalties * HIDDEN, generator=generator).repeat(n_problems, 1, 1) / k**0.5,
        torch.randn(1, n_penalties * HIDDEN, generator=generator).repeat(n_problems, 1) / 2,
        torch.zeros(n_problems, n_penalties, HIDDEN, count),
        torch.zeros(n_problems, n_penalties, count),
    ]
    average = [w.clone() for w in weights]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    shrink_hidden = decay.repeat_interleave(HIDDEN, dim=1)[:, None]  # [F, 1, P h]
    shrink = [shrink_hidden, None, decay[:, :, None, None], None]
    states = {}
    for step in range(1, steps[-1] + 1):
        rows = starts[:, None] + (torch.rand(n_problems, BATCH, generator=generator) * sizes[:, None]).long()
        gradients = mlp_gradients(weights, x[rows], z[rows], base[rows])
        for i, gradient in enumerate(gradients):
            penalty = shrink[i]
            if penalty is not None:
                gradient = gradient + penalty * weights[i]
            first[i].lerp_(gradient, 0.1)
            second[i].lerp_(gradient * gradient, 0.01)
            root = (second[i] / (1 - 0.99**step)).sqrt_().add_(1e-8)
            weights[i] -= (RATE / (1 - 0.9**step)) * first[i] / root
            average[i].lerp_(weights[i], max(1 - AVERAGE, 1 / step))
        if step in steps:
            states[step] = tuple(w.double().numpy().copy() for w in average)
    return states


def mlp_gradients(weights: Sequence[Tensor], x: Tensor, z: Tensor, base: Tensor) -> list[Tensor]:
    """Return the gradients of the mean log-loss: x [F, B, k], z [F, B], base [F, B, K]; all MLPs of a problem share its rows."""
    v, c, u, d = weights
    n_problems, n_rows, _ = x.shape
    n_penalties, count = d.shape[1:]
    before = torch.baddbmm(c[:, None], x, v)  # [F, B, P h]
    hidden = torch.nn.functional.gelu(before, approximate="tanh")
    by_penalty = hidden.view(n_problems, n_rows, n_penalties, HIDDEN).transpose(1, 2)  # [F, P, B, h]
    logits = by_penalty @ u + d[:, :, None] + base[:, None]
    residual = torch.softmax(logits, -1)
    residual -= torch.nn.functional.one_hot(z, count)[:, None]
    residual /= n_rows
    slope = torch.ops.aten.gelu_backward(
        (residual @ u.transpose(-1, -2)).transpose(1, 2).reshape(n_problems, n_rows, -1), before, approximate="tanh"
    )
    return [x.transpose(1, 2) @ slope, slope.sum(1), by_penalty.transpose(-1, -2) @ residual, residual.sum(2)]


def _predictor(problem: Problem, state: tuple[np.ndarray, ...], f: int, p: int) -> Predictor:
    v, c, u, d = state
    part = slice(p * HIDDEN, (p + 1) * HIDDEN)
    own = (v[f][:, part], c[f][part], u[f, p], d[f, p])
    base = problem.base

    def predict(features: np.ndarray) -> np.ndarray:
        before = features @ own[0] + own[1]
        hidden = 0.5 * before * (1 + np.tanh(np.sqrt(2 / np.pi) * (before + 0.044715 * before**3)))
        return log_softmax(base(features) + hidden @ own[2] + own[3])

    return predict
