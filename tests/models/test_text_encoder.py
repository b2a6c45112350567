"""The encoder of captions, and where its pooled vector enters an `mmdit`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.core import schema
from attnjax.models import mmdit, text_encoder
from attnjax.models.text_encoder import END, PADDING

M, WIDTH, DIM, SIDE = 5, 12, 16, 4
TEXT = dict(num_layers=1, embed_dim=WIDTH, num_heads=2, max_len=M)


def filled(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), tree
    )


def test_every_token_sees_all_others_in_their_order_and_the_end_is_pooled():
    config = text_encoder.Config(**TEXT)
    module = nnx.eval_shape(
        lambda: text_encoder.TextEncoder(
            config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0)
        )
    )
    graph, state = nnx.split(module)
    encoder = nnx.merge(graph, filled(state))
    captions = np.full((3, M), PADDING)
    captions[0, :4] = 97, 98, 99, END
    captions[1, :4] = 97, 98, 100, END
    captions[2, :4] = 98, 97, 99, END
    features, pooled, is_token = jax.jit(lambda c: encoder(c))(captions)
    np.testing.assert_array_equal(is_token, [[True] * 4 + [False]] * 3)
    np.testing.assert_array_equal(pooled, features[:, 3])
    # A later byte is seen by the first one; two that change places are not alike.
    assert np.abs(features[0, 0] - features[1, 0]).max() > 1e-3
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-3


def test_time_and_pooled_text_shift_and_scale_the_last_norm():
    """Where layers pass their input on, as at the start, that is all there is."""
    given = dict(embed_dim=DIM, num_heads=2, num_layers=1, mlp_dim=8, text=TEXT)
    config = schema.build(mmdit.Config, mmdit.resolve(given))
    sizes = dict(image_size=SIDE, channels=2, out_channels=2)
    model = mmdit.MMDiT(config, **sizes)
    params, buffers = jax.eval_shape(model.init, 0)
    layers = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params["layers"])
    params = filled(params) | {"layers": layers}
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, SIDE, SIDE, 2)).astype(np.float32)
    pooled = rng.normal(size=(2, WIDTH)).astype(np.float32)
    features = rng.normal(size=(2, M, WIDTH)).astype(np.float32)
    times = np.asarray([0.03, 0.871], np.float32)

    @jax.jit
    def call(params):
        text = (features, pooled, None)
        ctx = model.context(batch=2)
        x = model.embed(params, images)
        time = model._merge(params).time(times)
        out, _ = model.denoise(params, buffers, images, times, text, ctx)
        return out, x, time

    out, x, time = (np.asarray(a, np.float64) for a in call(params))

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    own = params["pooled"]
    condition = time + linear(silu(linear(pooled, own["hidden"])), own["out"])
    made = linear(silu(condition), params["final_modulation"]["linear"])
    shift, scale = np.split(made[:, None], 2, axis=-1)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps)
    wanted = linear(x * (1 + scale) + shift, params["head"])
    wanted = nn.unpatchify(jnp.asarray(wanted), model.grid, 2)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4)
