"""Positions on a grid of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import nn
from attnjax.core.errors import UserError

GRID = (3, 5)


def places(extra=0):
    return jnp.arange(extra + 15, dtype=jnp.int32)[None]


def test_coordinates_are_rows_and_columns_behind_the_extra_tokens():
    rope = nn.AxialRope(grid=GRID, extra_tokens=2)
    found = np.asarray(rope.coordinates(places(2))[0])
    np.testing.assert_array_equal(found[:3], 0)
    np.testing.assert_array_equal(found[2:], list(np.ndindex(GRID)))
    cube = nn.AxialRope(grid=(2, 3, 4))
    found = cube.coordinates(jnp.arange(24, dtype=jnp.int32)[None])[0]
    np.testing.assert_array_equal(found, list(np.ndindex(2, 3, 4)))


def test_the_rotation_is_that_of_complex_numbers_axis_by_axis():
    """Head of 10: two pairs an axis, pair i is entries i and i + 4, two stay."""
    rope = nn.AxialRope(theta=50.0, grid=GRID, extra_tokens=1)
    x = np.random.default_rng(0).normal(size=(1, 16, 2, 10)).astype(np.float32)
    out = np.asarray(nn.apply_rope(jnp.asarray(x), places(1), rope))
    frequency = [1.0, 50.0**-0.5]
    for t in range(16):
        row, column = divmod(t - 1, 5) if t else (0, 0)
        angles = np.array(
            [row * f for f in frequency] + [column * f for f in frequency]
        )
        pairs = x[0, t, :, :4] + 1j * x[0, t, :, 4:8]
        turned = pairs * np.exp(1j * angles)
        wanted = np.concatenate([turned.real, turned.imag, x[0, t, :, 8:]], axis=-1)
        np.testing.assert_allclose(out[0, t], wanted, atol=2e-6)


def test_scores_depend_on_the_difference_of_coordinates_alone():
    rope = nn.AxialRope(theta=100.0, grid=GRID)
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    rows = [jnp.broadcast_to(a, (1, 15, 1, 8)) for a in (query, key)]
    query, key = (nn.apply_rope(a, places(), rope)[0, :, 0] for a in rows)
    scores = np.asarray(query @ key.T).reshape(*GRID, *GRID)
    moved = scores[1:, 2:, 1:, 2:]
    np.testing.assert_allclose(moved, scores[:-1, :-2, :-1, :-2], atol=1e-4)
    assert abs(scores[0, 0, 0, 1] - scores[0, 0, 1, 0]) > 1e-3


def test_a_grid_of_one_axis_is_a_sequence():
    x = jax.random.normal(jax.random.key(0), (2, 7, 1, 6))
    line = jnp.arange(7, dtype=jnp.int32)[None]
    plain = nn.Rope(theta=30.0, scaling="linear", factor=2.0)
    on_grid = nn.rope_on_grid(plain, (7,), 0)
    np.testing.assert_allclose(
        nn.apply_rope(x, line, on_grid), nn.apply_rope(x, line, plain), atol=1e-6
    )


def test_settings_stay_what_they_are_without_a_grid():
    plain = nn.Rope(theta=7.0)
    assert nn.rope_on_grid(plain, None, 0) is plain
    assert nn.rope_on_grid(None, GRID, 0) is None
    axial = nn.rope_on_grid(plain, GRID, 3)
    assert (axial.theta, axial.grid, axial.extra_tokens) == (7.0, GRID, 3)
    assert nn.rope_on_grid(axial, (9, 9), 0) is axial


def test_a_head_without_a_pair_for_every_axis_is_refused():
    rope = nn.AxialRope(grid=(2, 2, 2))
    assert [rope.rotated_dim(d) for d in (5, 6, 64)] == [0, 6, 60]
    x = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(UserError, match="a pair of entries for each of 3 axes"):
        nn.apply_rope(x, jnp.arange(8, dtype=jnp.int32)[None], rope)


def test_sincos_is_what_its_formula_says():
    table = nn.sincos_2d((2, 3), 8, temperature=100.0)
    assert table.shape == (6, 8)
    for place, (row, column) in enumerate(np.ndindex(2, 3)):
        wanted = [np.sin(column), np.sin(column / 100), np.cos(column)]
        wanted += [np.cos(column / 100), np.sin(row), np.sin(row / 100)]
        wanted += [np.cos(row), np.cos(row / 100)]
        np.testing.assert_allclose(table[place], wanted, atol=1e-12)


def test_sincos_of_a_finer_grid_lies_between_that_of_the_trained_one():
    fine = nn.sincos_2d((6, 6), 8, trained=(2, 2)).reshape(6, 6, 8)
    coarse = nn.sincos_2d((2, 2), 8).reshape(2, 2, 8)
    np.testing.assert_allclose(fine[1::3, 1::3], coarse, atol=1e-12)
    np.testing.assert_allclose(
        nn.sincos_2d((3, 3), 8, trained=(3, 3)), nn.sincos_2d((3, 3), 8), atol=1e-12
    )


@pytest.mark.parametrize("dim", [4, 10])
def test_sincos_needs_a_pair_of_frequencies_at_least(dim):
    with pytest.raises(ValueError, match=f"at least 8; got dim={dim}"):
        nn.sincos_2d((2, 2), dim)


def test_a_resampled_table_keeps_constants_and_ramps():
    rows, columns = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")
    table = np.stack([np.full((4, 4), 3.0), rows, columns], -1).reshape(16, 3)
    out = nn.resample_table(jnp.asarray(table, jnp.float32), (4, 4), (8, 8))
    out = np.asarray(out).reshape(8, 8, 3)
    np.testing.assert_allclose(out[..., 0], 3.0, atol=1e-5)
    inner = (np.arange(8) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(out[3:5, 4, 1], inner[3:5], atol=1e-5)
    np.testing.assert_allclose(out[4, 3:5, 2], inner[3:5], atol=1e-5)
    small = nn.resample_table(jnp.asarray(table, jnp.bfloat16), (4, 4), (2, 3))
    assert small.shape == (6, 3) and small.dtype == jnp.bfloat16


def test_a_table_of_the_same_grid_is_itself():
    table = jnp.ones((6, 2))
    assert nn.resample_table(table, (2, 3), (2, 3)) is table
    with pytest.raises(ValueError, match="got 6 rows, source=\\(3, 3\\)"):
        nn.resample_table(table, (3, 3), (2, 2))
