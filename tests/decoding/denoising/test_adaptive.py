"""The pair of Dormand and Prince against its known numbers, and its steps."""

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.decoding.denoising import adaptive


def stages(slope, x, t, size):
    """Where a step leads and its estimated error, in float64."""
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        slopes, ahead = adaptive._stages(slope, x, t, size, slope(x, t))
        error = size * jnp.tensordot(jnp.asarray(adaptive.ERROR), slopes, 1)
        return np.asarray(ahead), np.asarray(error)


def test_a_step_of_a_linear_equation_is_its_known_polynomial():
    z = 0.7
    ahead, error = stages(lambda x, t: z * x, [1.0], 0.0, 1.0)
    known = [1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 600]
    lower = [*known[:5], 1097 / 120000, 161 / 120000, 1 / 24000]
    wanted = np.polynomial.polynomial.polyval(z, known)
    np.testing.assert_allclose(ahead, wanted, rtol=1e-14)
    other = np.polynomial.polynomial.polyval(z, lower)
    np.testing.assert_allclose(error, wanted - other, rtol=1e-10)


def test_a_step_is_of_order_five_where_slopes_depend_on_place_and_time():
    def slope(x, t):
        return -2 * t * x**2

    def off(size):
        start = 1 / (1 + 0.3**2)
        ahead, _ = stages(slope, [start], 0.3, size)
        return abs(ahead[0] - 1 / (1 + (0.3 + size) ** 2))

    np.testing.assert_allclose(np.log2(off(0.1) / off(0.05)), 6, atol=0.1)


def test_steps_follow_the_slope_and_all_tries_are_counted():
    asked = []

    def slope(x, t):
        jax.debug.callback(lambda t: asked.append(float(t)), t, ordered=True)
        return 4 * jnp.cos(25 * t**3) * 3 * t**2 * x

    @jax.jit
    def run(start):
        how = {"first": 0.0, "last": 1.0, "atol": 1e-6, "rtol": 1e-5}
        return adaptive.dopri5(slope, start, max_steps=60, **how)

    x, count = run(jnp.ones((3, 2)))
    jax.effects_barrier()
    assert len(asked) == count and max(asked) == 1.0
    # Tries that were not taken go back.
    assert np.min(np.diff(asked)) < -0.01
    np.testing.assert_allclose(x, np.exp(4 / 25 * np.sin(25.0)), rtol=1e-4)


def test_steps_of_no_number_end():
    @jax.jit
    def run(start):
        how = {"first": 0.0, "last": 1.0, "atol": 1e-6, "rtol": 1e-3}
        return adaptive.dopri5(lambda x, t: x * jnp.nan, start, max_steps=5, **how)

    x, count = run(jnp.ones(2))
    assert np.isnan(x).all() and count == 31


def test_the_next_step_follows_the_error_now_and_before():
    def factor(ratio, before=1.0, rejected=False):
        given = (jnp.float32(a) for a in (ratio, before))
        return float(adaptive._factor(*given, jnp.asarray(rejected)))

    np.testing.assert_allclose(factor(0.5), 0.9 * 0.5**-0.14, rtol=1e-6)
    # An error that grew makes shorter steps than one that fell.
    wanted = 0.9 * 0.5**-0.14 * 0.01**0.08
    np.testing.assert_allclose(factor(0.5, 0.01), wanted, rtol=1e-6)
    np.testing.assert_allclose(factor(32.0), 0.9 / 2, rtol=1e-6)
    found = [factor(0.0), factor(0.1, rejected=True), factor(1e9), factor(np.nan)]
    np.testing.assert_allclose(found, [10, 1, 0.2, 0.2], rtol=1e-6)


def test_the_error_is_a_mean_over_all_entries():
    """Beside entries that stand still the same one takes longer steps."""
    counts = []
    for still in (0, 63):
        moves = np.arange(1 + still) == 0
        _, count = jax.jit(
            lambda start, moves=moves: adaptive.dopri5(
                lambda x, t: jnp.where(moves, 5 * x * jnp.cos(9 * t), 0.0),
                start,
                first=0.0,
                last=1.0,
                atol=1e-6,
                rtol=1e-5,
                max_steps=100,
            )
        )(jnp.ones(1 + still))
        counts.append(int(count))
    assert counts[1] < 0.85 * counts[0]
