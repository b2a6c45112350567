"""A layer of two streams: what is drawn in each, and what they report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.core import schema
from attnjax.core.context import Context
from attnjax.mixers.slots import joint
from attnjax.models import mmdit
from attnjax.models.joint_block import JointBlock

B, M, DIM = 2, 4, 8


def test_equal_streams_draw_dropout_of_their_own():
    given = dict(embed_dim=DIM, num_heads=2, num_layers=2, mlp_dim=8, patch_size=1)
    config = schema.build(mmdit.Config, mmdit.resolve(given))
    model = mmdit.MMDiT(config, image_size=2, channels=1, out_channels=1)
    dims = dataclasses.replace(model.block_dims, dropout=0.5)
    block = JointBlock(
        lambda *, rngs: model.choices["attention"].make(model.dims, rngs=rngs),
        dims,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(0)
    own = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype),
        nnx.to_pure_dict(nnx.state(block.image)),
    )
    nnx.update(block, {"image": own, "text": own})
    half = rng.normal(size=(B, M, DIM)).astype(np.float32)
    ctx = Context(
        positions=jnp.broadcast_to(jnp.arange(2 * M), (B, 2 * M)),
        causal=False,
        condition=jnp.asarray(rng.normal(size=(B, DIM)), jnp.float32),
        extra_tokens=M,
    )

    @jax.jit
    def call(key, x):
        learning = ctx.replace(train=True, prng_key=key)
        return [block(x, {}, how)[0] for how in (ctx, learning)]

    plain, dropped = call(jax.random.key(0), np.concatenate([half, half], axis=1))
    np.testing.assert_allclose(plain[:, :M], plain[:, M:], atol=1e-5)
    assert np.abs(dropped - plain).max() > 1e-3
    assert np.abs(dropped[:, :M] - dropped[:, M:]).max() > 1e-3


def test_what_both_streams_report_is_their_mean():
    assert joint._means([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}
