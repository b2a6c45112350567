"""A small encoder of captions: features of every token, and one vector of all.

A bidirectional Transformer over the bytes of a caption and a mark at their end. The
pooled vector is the last layer's at that mark, as CLIP's is (Radford et al., arXiv
2103.00020, section 2.4). It learns with the model that it tells.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.mixers import attention
from attnjax.models.block import Block, BlockDims

# Ids of captions: 0 to 255 are bytes of UTF-8.
END = 256
PADDING = -1


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.model.text`.

    Attributes:
        num_layers: depth.
        embed_dim: width of features and pooled vector.
        num_heads: heads of its attention.
        max_len: M, most tokens of a caption: its bytes and the mark at their end.
            Every caption takes this much room in the layers of the model.
    """

    num_layers: int = 2
    embed_dim: int = 64
    num_heads: int = 4
    max_len: int = 32

    def __post_init__(self):
        for name in ("num_layers", "embed_dim", "num_heads", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {name}={getattr(self, name)}."
                )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                "num_heads must divide embed_dim; got "
                f"num_heads={self.num_heads}, embed_dim={self.embed_dim}."
            )


def encode(text: str, length: int, *, owner: str) -> np.ndarray:
    """int32 [length]: the ids of a caption; the empty one says nothing.

    Args:
        text: the caption.
        length: M.
        owner: what gave it, for messages.

    Raises:
        UserError: for a caption that is longer, or no UTF-8.
    """
    try:
        ids = list(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UserError(
            f"{owner}: a caption must be UTF-8; got {text!r}, whose character "
            f"{error.start + 1} is none. Write it anew."
        ) from error
    if len(ids) >= length:
        raise UserError(
            f"{owner}: a caption has at most {length - 1} bytes of UTF-8, "
            f"config.model.text.max_len={length} less the mark at its end; got "
            f"{len(ids)} in {text!r}. Shorten it, or train with max_len="
            f"{len(ids) + 1} or more."
        )
    return np.asarray([*ids, *empty(length - len(ids))], np.int32)


def empty(length: int) -> tuple[int, ...]:
    """The ids of the caption that says nothing."""
    return (END,) + (PADDING,) * (length - 1)


def flops(config: Config) -> float:
    """Forward FLOPs (2 a multiply-add) of one caption."""
    length, dim = config.max_len, config.embed_dim
    each = 2.0 * length * 12 * dim**2 + 4.0 * length**2 * dim
    return config.num_layers * each


class TextEncoder(nnx.Module):
    """Captions [B, M] -> features [B, M, W] and pooled vectors [B, W].

    Parameters: "token_embedding", "position_embedding", "layer_<i>", "final_norm".

    Args:
        config: `config.model.text`.
        dtype, param_dtype: names of compute and storage dtype.
        kernel, target: of its attention, as in `MixerDims`.
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: str,
        param_dtype: str,
        kernel: str = "auto",
        target=None,
        rngs: nnx.Rngs,
    ):
        c, dim = config, config.embed_dim
        stored = dict(dtype=dtype_of(dtype), param_dtype=dtype_of(param_dtype))
        self.config = config
        self.token_embedding = nn.Embedding(END + 1, dim, **stored, rngs=rngs)
        self.position_embedding = nn.Embedding(c.max_len, dim, **stored, rngs=rngs)
        shared = dict(embed_dim=dim, use_bias=True, norm="layer")
        shared |= dict(dtype=dtype, param_dtype=param_dtype)
        out_std = 0.02 / (2 * c.num_layers) ** 0.5
        dims = MixerDims(
            **shared,
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_dim=dim // c.num_heads,
            num_layers=c.num_layers,
            max_len=c.max_len,
            out_init_std=out_std,
            kernel=kernel,
            target=target,
        )
        block = BlockDims(**shared, mlp_dim=4 * dim, activation="gelu", out_std=out_std)
        make = partial(attention.Mixer, attention.Config(), dims)
        for i in range(c.num_layers):
            setattr(self, f"layer_{i}", Block(make, block, rngs=rngs))
        self.final_norm = nn.make_norm(
            "layer",
            dim,
            eps=1e-6,
            use_bias=True,
            param_dtype=dtype_of(param_dtype),
            rngs=rngs,
        )

    def __call__(
        self, captions: jax.Array, *, rows=None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features, pooled vectors, and which tokens are no padding.

        Args:
            captions: int32 [B, M]: bytes, END, and PADDING behind it.
            rows: how arrays [B, ...] lie on the devices, or None on one.

        Returns:
            [B, M, W] and [B, W] in the compute dtype, bool [B, M].
        """
        is_token = captions != PADDING
        places = jnp.arange(captions.shape[1], dtype=jnp.int32)
        ctx = Context(
            positions=jnp.broadcast_to(places, captions.shape),
            segment_ids=is_token.astype(jnp.int32),
            causal=False,
            rows=rows,
        )
        x = self.token_embedding(jnp.where(is_token, captions, END))
        x = ctx.spread(x + self.position_embedding(places))
        for i in range(self.config.num_layers):
            x, _, _ = getattr(self, f"layer_{i}")(x, {}, ctx)
        x = self.final_norm(x)
        end = jnp.sum(is_token, axis=1) - 1
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return x, pooled, is_token
