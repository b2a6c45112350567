"""Layers on grids, taken apart for oracles in float64 that go token by token."""

import itertools
import math

import jax
import numpy as np

from attnjax.conformance import samples
from attnjax.conformance.subject import subject


def made(module, grid, options=None, **dims):
    """A layer made for a grid, without rotary positions."""
    return subject(module, options or {}, {"rope": None, "grid": grid, **dims})


def tokens(layer, *, extra=0, batch=2, **changes):
    """x [B, T, C] and the request of a model of images."""
    grid = layer.dims.grid
    changes = {"causal": False, "grid": grid, "extra_tokens": extra, **changes}
    length = extra + math.prod(grid or (12,))
    return samples.sample(layer, None, length=length, batch=batch, **changes)


def wide(tree):
    """Parameters as float64."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def applied(linear, x):
    """x W + b."""
    return x @ linear["kernel"] + linear.get("bias", 0)


def heads(params, x, head_dim):
    """query [B, T, H, D], key and value [B, T, K, D], float64."""
    return tuple(
        applied(params[name], x).reshape(*x.shape[:2], -1, head_dim)
        for name in ("query", "key", "value")
    )


def out(params, found):
    """[B, T, H, D] -> [B, T, C]."""
    return applied(params["out"], found.reshape(*found.shape[:2], -1))


def one_row(query, key, value, bias=0.0):
    """One softmax: query [D], keys [S, D], values [S, E], bias [S] -> [E]."""
    scores = key @ query / len(query) ** 0.5 + bias
    weights = np.exp(scores - scores.max())
    return weights @ value / weights.sum()


def by_hand(qkv, keys_of, bias_of=None):
    """Attention [B, T, H, D] of heads as `heads` gives them.

    Args:
        keys_of: token -> list of the tokens that it sees.
        bias_of: (head, token, tokens that it sees) -> what is added to the scores.
    """
    query, key, value = qkv
    found = np.zeros(query.shape)
    batch, length, num_heads, _ = query.shape
    share = num_heads // key.shape[2]
    for t, h in itertools.product(range(length), range(num_heads)):
        seen = keys_of(t)
        bias = 0.0 if bias_of is None else bias_of(h, t, seen)
        for b in range(batch):
            row = (a[b, seen, h // share] for a in (key, value))
            found[b, t, h] = one_row(query[b, t, h], *row, bias)
    return found


def coordinates(grid):
    """The places of a grid in row-major order."""
    return list(itertools.product(*map(range, grid)))


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def dependence(layer):
    """Which output depends on which input, bool [T, T]: row s of a batch has another
    token s."""
    x, ctx = tokens(layer, batch=1 + math.prod(layer.dims.grid))
    x[:] = x[:1]
    rows = np.arange(x.shape[1])
    x[1 + rows, rows] += 3 * np.random.default_rng(1).normal(size=x.shape[2])
    y = layer.y(x, ctx)
    return (np.abs(y[1:] - y[0]).max(-1) > 1e-6).T
