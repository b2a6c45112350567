"""What denoisers of images share: checks, first values, and the parts at both ends."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.models import backbone
from attnjax.models.block import BlockDims


def check(config: Any, *rules) -> None:
    """Raise UserError where settings of any denoiser do not fit one another.

    Args:
        config: has what `backbone.Config` has, patch_size, positions_grid and
            time_features.
        rules: more of `backbone.check_ranges`.
    """
    backbone.check(config)
    backbone.check_ranges(
        config,
        ("patch_size", "at least 1", lambda v: v >= 1),
        ("positions_grid", "at least 1", lambda v: v >= 1),
        *rules,
        ("time_features", "even, and at least 2", lambda v: v >= 2 and v % 2 == 0),
    )
    if config.init_std is None and config.scale_out_init:
        raise UserError(
            "config.model.scale_out_init: divides init_std; got scale_out_init=true, "
            "init_std=none. Set config.model.init_std, e.g. to 0.02."
        )


# ---- first values where init_std is none, as the released code of DiT has them


def xavier(inputs: int, outputs: int) -> float:
    """The standard deviation of Xavier's uniform values (Glorot and Bengio, 2010)."""
    return math.sqrt(2.0 / (inputs + outputs))


def attention_stds(dim: int) -> tuple[float, float]:
    """Of the maps into attention and out of it; query, key and value are one map."""
    return xavier(dim, 3 * dim), xavier(dim, dim)


def with_xavier_mlp(dims: BlockDims) -> BlockDims:
    """`dims` with the standard deviation of the MLP's maps."""
    std = xavier(dims.embed_dim, dims.mlp_dim)
    return dataclasses.replace(dims, std=std, out_std=std)


# ---- the parts at both ends


def patch_embedding(model: Any, **stored) -> nn.PatchEmbedding:
    """Images [B, H, W, Ch] -> [B, N, C]; `stored` are its dtypes and rngs."""
    c = model.config
    std = xavier(c.patch_size**2 * model.channels, c.embed_dim)
    shape = (c.patch_size, model.channels, c.embed_dim)
    return nn.PatchEmbedding(*shape, use_bias=c.use_bias, std=std, **stored)


def final_norm(config: Any, *, rngs: nnx.Rngs) -> nnx.Module:
    """The norm behind the last layer; its shift and scale are the condition's."""
    return nn.make_norm(
        config.norm,
        config.embed_dim,
        eps=config.norm_eps,
        learned=False,
        param_dtype=dtype_of(config.param_dtype),
        rngs=rngs,
    )


def head(model: Any, **stored) -> nn.Linear:
    """[B, N, C] -> the pixels of every patch; zero at the start."""
    c = model.config
    outputs = c.patch_size**2 * model.out_channels
    return nn.Linear(c.embed_dim, outputs, use_bias=c.use_bias, std=0.0, **stored)


def predicted(
    model: Any, ends: Any, x: jax.Array, condition: jax.Array, ctx: Context
) -> jax.Array:
    """What the network says, float32 (or wider) [B, H, W, out_channels].

    Args:
        ends: with final_norm, final_modulation and head.
        x: patches behind the last layer, [B, N, C].
        condition: [B, C].
    """
    shift, scale = ends.final_modulation(condition)
    x = ends.head(nn.shifted(ctx.spread(ends.final_norm(x)), shift, scale))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.unpatchify(x, model.grid, model.config.patch_size)


def dropped(
    told: jax.Array, nothing: Any, rate: float, prng_key: jax.Array
) -> jax.Array:
    """What images are told, int32 [B] or [B, M], of which a share is `nothing`.

    Args:
        nothing: a label, or a row of M ids; None: no row is dropped.
        rate: the share.
    """
    if nothing is None:
        return told
    gone = jax.random.bernoulli(prng_key, rate, told.shape[:1])
    gone = gone.reshape(-1, *(1,) * (told.ndim - 1))
    return jnp.where(gone, jnp.asarray(nothing, told.dtype), told)
