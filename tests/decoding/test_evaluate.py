"""Whether a run's model fits the data on which it is evaluated."""

import types

import jax
import pytest

from attnjax.core.errors import UserError
from attnjax.decoding import evaluate
from attnjax.training import experiment, feeds

SMALL = dict(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, patch_size=4)


def checked(run_size, own_size, **model):
    """`evaluate`'s look at a run of images of one size and data of another."""
    data = {"name": "digits", "image_size": own_size}
    config = experiment.resolve({"model": {**SMALL, **model}, "data": data})
    feed = feeds.make(config)

    def made(size):
        sizes = feed.planned_sizes() | {"image_size": size}
        return feed.make_model(config, sizes, platform="cpu", target=None)

    trained = made(run_size)
    params, buffers = jax.eval_shape(trained.init, 0)
    run = types.SimpleNamespace(model=trained, params=params, buffers=buffers)
    evaluate._check_fits(run, types.SimpleNamespace(feed=feed, model=made(own_size)))


@pytest.mark.parametrize("name", ["vit", "dit"])
def test_fixed_positions_of_another_size_must_be_asked_for(name):
    checked(8, 8, name=name, positions="sincos")
    wanted = (
        r"positions_grid: must be said .* trained on 2 x 2 patches; got none, and "
        r"3 x 3 patches. Set it: 2 keeps .*, 3 counts on"
    )
    with pytest.raises(UserError, match=wanted):
        checked(8, 12, name=name, positions="sincos")
    for grid in (2, 3):
        checked(8, 12, name=name, positions="sincos", positions_grid=grid)
    for positions in ("rope", "none"):
        checked(8, 12, name=name, positions=positions)


def test_learned_positions_of_another_size_are_another_shape():
    with pytest.raises(UserError, match=r"got image_size=12(.|\n)*positions_grid=2"):
        checked(8, 12, name="vit", positions="learned")
    checked(8, 12, name="vit", positions="learned", positions_grid=2)
