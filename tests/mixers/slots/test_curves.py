"""Rows of shares on curves to the identity, sharpened and flattened."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.mixers.slots import curves

B, H, T = 2, 3, 7
SHARES = np.asarray([0.0, 0.3, 0.7, 1.0])
NAMES = ("slerp", "nlerp", "log_linear", "tempered")


def rows(sink):
    """Weights, which keys are seen, and what a sink has; float64. One row sees its own
    key alone."""
    rng = np.random.default_rng(0)
    seen = np.tril(np.ones((T, T), bool)) | (rng.random((T, T)) < 0.3)
    seen[2] = np.arange(T) == 2
    scores = np.where(seen, 2 * rng.normal(size=(B, H, T, T)), -np.inf)
    parts = np.exp(scores)
    rest = sink * np.ones((B, H, T, 1))
    total = parts.sum(-1, keepdims=True) + rest
    return parts / total, seen, rest / total


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["softmax", "sink"])
def moved(request):
    """What is given, and {name: [share, B, H, T, T]}, by one program."""
    given = weights, seen, rest = rows(request.param)

    @jax.jit
    def run(weights, rest, numbers):
        how = {"seen": seen, "rest": rest}
        return {
            name: jax.vmap(
                lambda u, name=name: getattr(curves, name)(weights, u, **how)
            )(numbers if name != "tempered" else jnp.asarray([0.5, 1.0, 3.0, 0.0]))
            for name in NAMES
        } | {"largest": curves.largest(weights)}

    with jax.enable_x64(True):
        found = run(weights, rest, SHARES)
        return given, {name: np.asarray(a) for name, a in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_rows_stay_shares_of_one_on_what_is_seen(moved, name):
    (_, seen, rest), found = moved
    assert found[name].min() >= 0 and found[name].max() <= 1 + 1e-12
    assert not found[name][..., ~seen].any()
    sums = found[name].sum(-1)
    if rest.any():
        assert sums.max() <= 1 + 1e-12
    else:
        np.testing.assert_allclose(sums, 1, atol=1e-12)


@pytest.mark.parametrize("name", NAMES[:3])
def test_curves_lead_from_the_weights_to_the_identity_and_are_not_straight(moved, name):
    (weights, _, _), found = moved
    at = found[name]
    np.testing.assert_allclose(at[0], weights, atol=1e-12)
    # The logarithm's identity has 1e-6 beside its diagonal.
    far = (T + 1) * 1e-6 if name == "log_linear" else 1e-12
    np.testing.assert_allclose(
        at[-1], np.broadcast_to(np.eye(T), at[-1].shape), atol=far
    )
    straight = 0.7 * at[0] + 0.3 * at[-1]
    assert np.abs(at[1] - straight).max() > 0.01


def test_both_geodesics_are_on_one_great_circle_at_their_own_speeds(moved):
    (weights, _, rest), found = moved
    # The sink's share is one more place of the unit vector.
    start = np.sqrt(np.concatenate([weights, rest], -1))
    end = np.broadcast_to(np.eye(T, T + 1), start.shape)
    whole = np.arccos(np.clip((start * end).sum(-1), 0, 1))
    for name in ("slerp", "nlerp"):
        left = 1 - found[name].sum(-1, keepdims=True)
        at = np.sqrt(np.concatenate([found[name], np.maximum(left, 0)], -1))
        # The angles to both ends add up: the point is on the arc between them.
        angles = [
            np.arctan2(
                np.linalg.norm(at - pole * (at * pole).sum(-1, keepdims=True), axis=-1),
                (at * pole).sum(-1),
            )
            for pole in (start, end)
        ]
        np.testing.assert_allclose(sum(angles), whole[None] + 0 * angles[0], atol=1e-6)
        equal = SHARES[:, None, None, None] * whole
        off = np.abs(angles[0] - equal).max()
        assert off < 1e-6 if name == "slerp" else off > 0.01


def test_temperatures_and_the_logarithms_curve_are_their_formulas(moved):
    (weights, _, rest), found = moved
    whole = np.concatenate([weights, rest], -1)
    for at, tau in zip(found["tempered"], (0.5, 1.0, 3.0), strict=False):
        powers = whole ** (1 / tau)
        wanted = powers / powers.sum(-1, keepdims=True)
        np.testing.assert_allclose(at, wanted[..., :-1], atol=1e-12)
    edge = np.full((T, T + 1), 1e-6)
    np.fill_diagonal(edge, 1)
    for at, u in zip(found["log_linear"][1:3], SHARES[1:3], strict=True):
        powers = edge**u * whole ** (1 - u)
        wanted = powers / powers.sum(-1, keepdims=True)
        np.testing.assert_allclose(at, wanted[..., :-1], atol=1e-12)


def test_the_coldest_temperature_is_the_largest_weight(moved):
    (weights, _, rest), found = moved
    wins = weights.max(-1) > rest[..., 0]
    assert wins.any()
    np.testing.assert_allclose(
        found["tempered"][-1][wins], found["largest"][wins], atol=1e-12
    )
    chosen = found["largest"].argmax(-1)
    np.testing.assert_array_equal(chosen, weights.argmax(-1))
    np.testing.assert_array_equal(found["largest"].sum(-1), 1)
    assert not np.asarray(curves.largest(jnp.zeros((1, 1, 2, 2)))).any()


def test_gradients_are_finite_where_weights_are_zero():
    weights, seen, rest = rows(0.0)

    @jax.jit
    @jax.grad
    def slopes(weights):
        how = {"seen": seen, "rest": rest}
        return sum(
            jnp.sum(getattr(curves, name)(weights, 0.5, **how) ** 2) for name in NAMES
        )

    assert np.isfinite(slopes(jnp.asarray(weights, jnp.float32))).all()
