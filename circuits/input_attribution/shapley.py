"""Shapley values: split a value among players by each player's average marginal contribution to coalitions.

Shapley (1953), "A value for n-person games". Sampling of orders of arrival after Castro et al. (2009, Computers &
Operations Research 36:1726): the mean marginal contribution to the players before, with its standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial

import numpy as np

from groundscope.core.errors import ConfigError

MOST = 10
"""Largest number of players for which all coalitions are enumerated: 1,024 coalitions."""


def coalitions(players: int) -> np.ndarray:
    """Return all coalitions, bool ``[2^players, players]``: row r contains player i if bit i of r is set."""
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
        float64 ``[..., players]``; the sum is the value of all players minus the value of none.

    Raises
    ------
    ConfigError
        If the number of values is not a power of two.
    """
    values = np.asarray(values, np.float64)
    n = values.shape[-1].bit_length() - 1
    if values.shape[-1] != 2**n:
        msg = f"got {values.shape[-1]} values; pass one for each of the 2^n coalitions of n players"
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
    """Return each player's share, estimated from random orders of arrival, and its standard error.

    Parameters
    ----------
    value
        Function from coalitions, bool ``[k, players]``, to their values ``[k]``; called once, with distinct coalitions.
    players
        Number of players.
    orders
        Number of random orders, at least 2.
    seed
        Seed of the random orders.

    Returns
    -------
    tuple of ndarray
        Shares and standard errors, float64 ``[players]`` each. The sum of shares is the value of all players minus the
        value of none, in every order and so on average.
    """
    random_orders = sample_orders(players, orders, seed)
    steps = arrivals(random_orders)  # [orders, players + 1, players]
    distinct, place = np.unique(steps.reshape(-1, players), axis=0, return_inverse=True)
    return from_orders(random_orders, value(distinct)[place].reshape(orders, players + 1))


def sample_orders(players: int, orders: int, seed: int) -> np.ndarray:
    """Return random orders of arrival, int ``[orders, players]``; raise `ConfigError` for fewer than 2."""
    if orders < 2:
        msg = f"orders={orders} is too small: a standard error needs at least 2"
        raise ConfigError(msg)
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.stack([rng.permutation(players) for _ in range(orders)])


def arrivals(orders: np.ndarray) -> np.ndarray:
    """Return the coalitions before the first arrival and after each, bool ``[orders, players + 1, players]``."""
    players = orders.shape[1]
    rank = np.empty_like(orders)
    np.put_along_axis(rank, orders, np.broadcast_to(np.arange(players), orders.shape), axis=1)
    return rank[:, None, :] < np.arange(players + 1)[None, :, None]


def from_orders(orders: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return shares and standard errors ``[players]`` from the values ``[orders, players + 1]`` along each order."""
    added = np.empty(orders.shape)
    np.put_along_axis(added, orders, np.diff(np.asarray(values, np.float64), axis=1), axis=1)
    return added.mean(0), added.std(0, ddof=1) / np.sqrt(len(orders))
