"""Vision transformers on circularly shifted images (arXiv 2306.07470)."""

import jax
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.models import vit

SIDE, PATCH, CHANNELS, CLASSES = 6, 2, 3, 5
SMALL = dict(embed_dim=16, num_heads=2, num_layers=2, patch_size=PATCH, mlp_dim=24)
SHIFTS = list(np.ndindex(SIDE, SIDE))


def make(**options):
    config = schema.build(vit.Config, vit.resolve({**SMALL, **options}))
    data = dict(image_size=SIDE, channels=CHANNELS, num_classes=CLASSES)
    return vit.ViT(config, **data)


def start(model, seed=0):
    """Arrays away from the constant starts of scales and biases."""
    rng = np.random.default_rng(seed)
    params, buffers = jax.eval_shape(model.init, 0)
    return jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(a.dtype), params
    ), jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), buffers)


def shifted_images():
    """One image in every circular shift."""
    image = np.random.default_rng(1).normal(size=(1, SIDE, SIDE, CHANNELS))
    rows = [np.roll(image, s, (1, 2)) for s in SHIFTS]
    return np.concatenate(rows).astype(np.float32)


def outputs(model, images):
    """The patches' tokens and the logits."""
    params, buffers = start(model)

    @jax.jit
    def call(params, buffers, images):
        ctx = model.context(batch=len(images))
        tokens = model.embed(params, images)[:, model.config.extra_tokens :]
        return tokens, model.logits(params, buffers, images, ctx)[0]

    tokens, logits = jax.device_get(call(params, buffers, images))
    return tokens.reshape(len(images), *model.grid, -1), logits


def moved_by(logits):
    """How far each shift moves the logits."""
    return np.abs(logits - logits[0]).max(-1)


# Spread of these logits: some 3.
CASES = {
    "mean": {"positions": "anchored_conv", "pool": "mean"},
    "class token": {"positions": "anchored_conv", "registers": 1},
    "learned": {"positions": "anchored_learned", "pool": "mean"},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_an_anchored_model_are_those_of_every_shift(case):
    tokens, logits = outputs(make(**CASES[case]), shifted_images())
    assert logits.std() > 0.3
    assert moved_by(logits).max() < 1e-5
    # The grids of tokens are one grid in whole shifts, or one and the same.
    count = 1 if case == "learned" else 9
    assert len(np.unique(tokens.round(4), axis=0)) == count


def test_patches_of_a_shifted_image_are_the_patches_moved_by_whole_tokens():
    tokens, _ = outputs(make(positions="anchored_conv"), shifted_images())
    turns = [np.roll(tokens[0], s, (0, 1)) for s in np.ndindex(3, 3)]
    for row in tokens:
        assert min(np.abs(row - turn).max() for turn in turns) < 1e-5


def test_without_an_anchor_logits_keep_under_shifts_by_whole_patches_alone():
    _, logits = outputs(make(positions="circular_conv", pool="mean"), shifted_images())
    whole = np.array([not (np.array(s) % PATCH).any() for s in SHIFTS])
    moved = moved_by(logits)
    assert moved[whole].max() < 1e-5
    assert moved[~whole].min() > 1e-2


def test_with_zeros_around_the_grid_an_anchored_model_is_not_invariant():
    model = make(positions="anchored_conv", pool="mean")
    params, _ = start(model)
    ends = model._merge(params)
    ends.conv_positions.circular = False
    model._merge = lambda params: ends
    _, logits = outputs(model, shifted_images())
    assert moved_by(logits).max() > 1e-2


def test_parameters_and_flops_of_convolutional_positions_are_counted():
    plain, placed, learned = (
        make(positions=p, pool="mean")
        for p in ("none", "anchored_conv", "anchored_learned")
    )
    assert placed.parameter_count() - plain.parameter_count() == 9 * 16 + 16
    assert placed.flops() - plain.flops() == 2 * 9 * 9 * 16
    assert learned.parameter_count() - plain.parameter_count() == 9 * 16


def test_only_tables_of_positions_have_a_grid_of_their_own():
    assert make(positions="anchored_learned", positions_grid=2).positions_grid == (2, 2)
    with pytest.raises(UserError, match="positions_grid: .* got positions=anchored_co"):
        make(positions="anchored_conv", positions_grid=2)
