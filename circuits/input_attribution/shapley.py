"""Shapley values: a sum split fairly among those who made it, by what each adds to every coalition of the others.

Shapley (1953), "A value for n-person games". Sampled by orders of arrival after Castro et al. (2009, Computers &
Operations Research 36:1726): the mean of what a player adds to those before it, with its standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial

import numpy as np

from groundscope.core.errors import ConfigError

MOST = 10
"""Players up to which every coalition is enumerated: 1,024 coalitions."""


def coalitions(players: int) -> np.ndarray:
    """Return every coalition, bool ``[2^players, players]``: none first, all last, player i in those with bit i."""
    return (np.arange(2**players)[:, None] >> np.arange(players)) % 2 == 1


def exact(values: np.ndarray) -> np.ndarray:
    """Return each player's share from the values of all coalitions.

    Parameters
    ----------
    values
        ``[..., 2^players]`` in the order of `coalitions`.

    Returns
    -------
    ndarray
        float64 ``[..., players]``; they add up to the value of all minus the value of none.

    Raises
    ------
    ConfigError
        Where there are not 2^n values.
    """
    values = np.asarray(values, np.float64)
    n = values.shape[-1].bit_length() - 1
    if values.shape[-1] != 2**n:
        msg = f"{values.shape[-1]} values: n players have 2^n coalitions"
        raise ConfigError(msg)
    size = coalitions(n).sum(1)  # [2^n]
    shares = []
    for player in range(n):
        without = np.flatnonzero(~coalitions(n)[:, player])
        weight = np.array([factorial(k) * factorial(n - k - 1) / factorial(n) for k in size[without]])
        shares.append((values[..., without + 2**player] - values[..., without]) @ weight)
    return np.stack(shares, axis=-1) if n else np.zeros((*values.shape[:-1], 0))


def sampled(
    value: Callable[[np.ndarray], np.ndarray], players: int, orders: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return each player's share, estimated over random orders of arrival, and its standard error.

    Parameters
    ----------
    value
        From coalitions, bool ``[k, players]``, to their values ``[k]``; asked once for each different coalition.
    players
        How many.
    orders
        How many orders are drawn, at least 2.
    seed
        Decides them.

    Returns
    -------
    tuple of ndarray
        Shares and standard errors, float64 ``[players]`` each. The shares add up to the value of all minus the value
        of none in every order, and so on average.
    """
    drawn = sample_orders(players, orders, seed)
    steps = arrivals(drawn)  # [orders, players + 1, players]
    different, place = np.unique(steps.reshape(-1, players), axis=0, return_inverse=True)
    return from_orders(drawn, value(different)[place].reshape(orders, players + 1))


def sample_orders(players: int, orders: int, seed: int) -> np.ndarray:
    """Return random orders of arrival, int ``[orders, players]``; raises `ConfigError` for fewer than 2."""
    if orders < 2:
        msg = f"orders={orders}: a standard error needs at least 2"
        raise ConfigError(msg)
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.stack([rng.permutation(players) for _ in range(orders)])


def arrivals(drawn: np.ndarray) -> np.ndarray:
    """Return who is there before the first arrival and after each, bool ``[orders, players + 1, players]``."""
    players = drawn.shape[1]
    rank = np.empty_like(drawn)
    np.put_along_axis(rank, drawn, np.broadcast_to(np.arange(players), drawn.shape), axis=1)
    return rank[:, None, :] < np.arange(players + 1)[None, :, None]


def from_orders(drawn: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return shares and standard errors ``[players]`` from the values ``[orders, players + 1]`` along each order."""
    added = np.empty(drawn.shape)
    np.put_along_axis(added, drawn, np.diff(np.asarray(values, np.float64), axis=1), axis=1)
    return added.mean(0), added.std(0, ddof=1) / np.sqrt(len(drawn))
