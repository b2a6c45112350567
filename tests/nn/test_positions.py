"""Rotary positions: relative, norm-preserving, and scaled as published; ALiBi."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import nn
from attnjax.core.errors import UserError

D = 8
SCALED = {
    "none": nn.Rope(),
    "half": nn.Rope(fraction=0.5),
    "linear": nn.Rope(scaling="linear", factor=3.0),
    "ntk": nn.Rope(scaling="ntk", factor=3.0),
    "llama3": nn.Rope(
        scaling="llama3", theta=500000.0, factor=8.0, original_len=64, high_freq=4.0
    ),
    "yarn": nn.Rope(scaling="yarn", factor=4.0, original_len=64, beta_fast=8.0),
}
ropes = pytest.mark.parametrize("rope", SCALED.values(), ids=SCALED.keys())


def vectors(seed, length=13, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, length, 3, D)), dtype)


def positions(length=13, start=0):
    return jnp.arange(start, start + length, dtype=jnp.int32)[None]


@ropes
def test_scores_depend_on_distances_alone(rope):
    def scores(shift):
        query = nn.apply_rope(vectors(0), positions(start=shift), rope)
        key = nn.apply_rope(vectors(1), positions(start=shift), rope)
        return jnp.einsum("bthd,bshd->bhts", query, key)

    np.testing.assert_allclose(scores(0), scores(57), atol=2e-4)


@ropes
def test_rotation_equals_complex_multiplication(rope):
    """Pair (i, i + R/2) is one complex number, turned by position x frequency."""
    x, at = vectors(2), np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97]])
    frequency, temperature = nn.rope_frequencies(D, rope)
    half = len(frequency)
    wide = np.asarray(x, np.float64)
    pairs = wide[..., :half] + 1j * wide[..., half : 2 * half]
    turned = pairs * temperature * np.exp(1j * at[..., None, None] * frequency)
    expected = np.concatenate([turned.real, turned.imag, wide[..., 2 * half :]], -1)
    found = nn.apply_rope(x, jnp.asarray(at), rope)
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_position_zero_changes_nothing_and_lengths_are_kept():
    x = vectors(3)
    still = nn.apply_rope(x, jnp.zeros((1, 13), jnp.int32), nn.Rope())
    np.testing.assert_array_equal(still, x)
    turned = nn.apply_rope(x, positions(start=1000), nn.Rope())
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_a_fraction_leaves_the_rest_alone():
    x = vectors(4)
    turned = nn.apply_rope(x, positions(start=5), nn.Rope(fraction=0.5))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    alone = nn.apply_rope(x[..., :4], positions(start=5), nn.Rope())
    np.testing.assert_allclose(turned[..., :4], alone, atol=1e-6)


def test_rotation_is_computed_in_float32_and_returned_in_the_dtype_of_x():
    x = vectors(5, dtype=jnp.bfloat16)
    found = nn.apply_rope(x, positions(start=4000), nn.Rope())
    assert found.dtype == jnp.bfloat16
    exact = nn.apply_rope(x.astype(jnp.float32), positions(start=4000), nn.Rope())
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-2)
    with jax.enable_x64(True):
        wide = nn.apply_rope(jnp.asarray(x, jnp.float64), positions(), nn.Rope())
        assert wide.dtype == jnp.float64


# ---- the published scalings, written as their sources write them, one pair at a time


def plain(theta, pair):
    return theta ** (-2 * pair / D)


def test_plain_frequencies_are_a_geometric_series():
    frequency, temperature = nn.rope_frequencies(D, nn.Rope(theta=100.0))
    np.testing.assert_allclose(frequency, [plain(100.0, i) for i in range(4)])
    assert temperature == 1.0 and frequency.dtype == np.float64


def test_linear_scaling_divides_every_frequency():
    frequency, _ = nn.rope_frequencies(D, SCALED["linear"])
    np.testing.assert_allclose(frequency, [plain(1e4, i) / 3 for i in range(4)])


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest():
    frequency, temperature = nn.rope_frequencies(D, SCALED["ntk"])
    assert temperature == 1.0
    np.testing.assert_allclose(frequency[0], 1.0)
    np.testing.assert_allclose(frequency[-1], plain(1e4, 3) / 3)
    grown = 1e4 * 3 ** (D / (D - 2))
    np.testing.assert_allclose(frequency, [plain(grown, i) for i in range(4)])


def llama3(rope, pair):
    """As transformers' `_compute_llama3_parameters`: by wavelength, three cases."""
    frequency = plain(rope.theta, pair)
    wavelength = 2 * math.pi / frequency
    if wavelength < rope.original_len / rope.high_freq:
        return frequency
    if wavelength > rope.original_len / rope.low_freq:
        return frequency / rope.factor
    smooth = rope.original_len / wavelength - rope.low_freq
    smooth /= rope.high_freq - rope.low_freq
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def test_llama3_divides_long_wavelengths_and_keeps_short_ones():
    rope = nn.Rope(scaling="llama3", theta=1e3, factor=8.0, original_len=64)
    expected = [llama3(rope, i) for i in range(4)]
    frequency, temperature = nn.rope_frequencies(D, rope)
    np.testing.assert_allclose(frequency, expected)
    assert temperature == 1.0
    ratio = frequency / [plain(1e3, i) for i in range(4)]
    # All three cases occur: kept, between, divided.
    assert ratio[0] == 1 and 1 / 8 < ratio[1] < 1 and ratio[-1] == 1 / 8


def yarn(rope, dim):
    """As transformers' `_compute_yarn_parameters`."""

    def correction(rotations):
        turns = rope.original_len / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(correction(rope.beta_fast)), 0)
    high = min(math.ceil(correction(rope.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for i in range(dim // 2):
        extrapolated = 1 / rope.theta ** (2 * i / dim)
        interpolated = extrapolated / rope.factor
        mask = 1 - min(max((i - low) / (high - low), 0), 1)
        frequencies.append(interpolated * (1 - mask) + extrapolated * mask)
    return frequencies, 0.1 * math.log(rope.factor) + 1


@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        SCALED["yarn"],
        nn.Rope(scaling="yarn", factor=4.0, original_len=32768, theta=1e6),
        nn.Rope(scaling="yarn", factor=16.0, original_len=10),
    ],
    ids=["ramp", "qwen", "no ramp"],
)
def test_yarn_equals_the_published_code(rope, dim):
    expected, expected_temperature = yarn(rope, dim)
    frequency, temperature = nn.rope_frequencies(dim, rope)
    np.testing.assert_allclose(frequency, expected)
    assert temperature == expected_temperature


def test_yarn_warms_query_and_key():
    x = vectors(6)
    turned = nn.apply_rope(x, positions(), SCALED["yarn"])
    ratio = jnp.linalg.norm(turned, axis=-1) / jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(ratio, 0.1 * math.log(4) + 1, rtol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\]; got 0.0"),
        ({"theta": -1.0}, "theta must be positive; got -1.0"),
        ({"scaling": "linear", "factor": 0.5}, "factor must be at least 1; got 0.5"),
        ({"original_len": 0}, "original_len must be at least 1; got 0"),
        ({"factor": 2.0}, "factor does nothing with scaling=none"),
        (
            {"scaling": "llama3", "low_freq": 4.0},
            "high_freq must exceed low_freq; got low_freq=4.0, high_freq=4.0",
        ),
        (
            {"scaling": "yarn", "beta_slow": 40.0},
            "beta_fast must exceed beta_slow; got beta_fast=32.0, beta_slow=40.0",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        nn.Rope(**settings)


def test_a_head_too_small_to_rotate_is_refused():
    with pytest.raises(UserError, match="head_dim=8, fraction=0.2"):
        nn.rope_frequencies(8, nn.Rope(fraction=0.2))
    with pytest.raises(UserError, match="ntk needs more than one rotated pair"):
        nn.rope_frequencies(2, nn.Rope(scaling="ntk", factor=2.0))


# ---- ALiBi


def test_alibi_slopes_of_a_power_of_two_are_halves():
    np.testing.assert_allclose(nn.alibi_slopes(8), [2.0**-i for i in range(1, 9)])


def test_alibi_slopes_of_12_heads_interleave_those_of_16():
    """Section 3 and the authors' code: 8 heads' slopes, then every other of 16."""
    eight = [2.0**-i for i in range(1, 9)]
    sixteen = [2.0 ** (-i / 2) for i in range(1, 17)]
    slopes = nn.alibi_slopes(12)
    np.testing.assert_allclose(slopes, eight + sixteen[0::2][:4], rtol=1e-6)
    assert slopes.dtype == np.float32


def test_alibi_slope_of_one_head():
    np.testing.assert_allclose(nn.alibi_slopes(1), [2.0**-8])
