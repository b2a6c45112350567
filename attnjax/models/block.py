"""One Transformer layer: a mixer and an MLP, each behind a norm and a residual."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context, MixerOut


@dataclasses.dataclass(frozen=True)
class BlockDims:
    """Settings of the parts of a layer that are not its mixer.

    Attributes:
        embed_dim: C.
        mlp_dim: hidden width of the MLP; 0 leaves the MLP sub-layer out.
        activation: a key of `nn.ACTIVATIONS`.
        norm, norm_eps, use_bias: the norm's kind, epsilon, and biases everywhere.
        residual_scale: factor on what each sub-layer adds.
        dropout: rate on what each sub-layer adds.
        std, out_std: initialisation of inner maps and of maps into the residual.
        dtype, param_dtype: compute and storage dtypes.
    """

    embed_dim: int
    mlp_dim: int
    activation: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6
    use_bias: bool = False
    residual_scale: float = 1.0
    dropout: float = 0.0
    std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); extra streams run through both."""

    def __init__(self, make_mixer, dims: BlockDims, *, rngs: nnx.Rngs):
        norm = dict(
            eps=dims.norm_eps,
            use_bias=dims.use_bias,
            param_dtype=jnp.dtype(dims.param_dtype),
            rngs=rngs,
        )
        self.dims = dims
        self.norm_mixer = nn.make_norm(dims.norm, dims.embed_dim, **norm)
        self.mixer = make_mixer(rngs=rngs)
        self.has_mlp = dims.mlp_dim > 0
        if self.has_mlp:
            self.norm_mlp = nn.make_norm(dims.norm, dims.embed_dim, **norm)
            self.mlp = nn.MLP(
                dims.embed_dim,
                dims.mlp_dim,
                activation=dims.activation,
                use_bias=dims.use_bias,
                std=dims.std,
                out_std=dims.out_std,
                dtype=jnp.dtype(dims.dtype),
                param_dtype=jnp.dtype(dims.param_dtype),
                rngs=rngs,
            )

    def __call__(
        self, x: jax.Array, streams: dict, ctx: Context
    ) -> tuple[jax.Array, dict, MixerOut]:
        """[B, T, C] and the raw streams -> the same, and the mixer's MixerOut."""
        normed = {name: self.norm_mixer(s) for name, s in streams.items()}
        y, out = self.mixer(self.norm_mixer(x), ctx.replace(streams=normed))
        x = self._add(x, y, ctx, 0)
        streams = {
            name: self._add(s, out.streams[name], ctx, 2) if name in out.streams else s
            for name, s in streams.items()
        }
        if self.has_mlp:
            x = self._add(x, self.mlp(self.norm_mlp(x)), ctx, 1)
            streams = {
                name: self._add(s, self.mlp(self.norm_mlp(s)), ctx, 3)
                for name, s in streams.items()
            }
        return x, streams, out

    def step(self, x: jax.Array, state, ctx: Context):
        """The same for decoding: [B, T, C] and the mixer's state -> both."""
        y, state = self.mixer.step(self.norm_mixer(x), state, ctx)
        x = self._add(x, y, ctx, 0)
        if self.has_mlp:
            x = self._add(x, self.mlp(self.norm_mlp(x)), ctx, 1)
        return x, state

    def _add(self, x, y, ctx: Context, salt: int):
        dims = self.dims
        if dims.dropout and ctx.train:
            y = nn.dropout(
                y,
                dims.dropout,
                prng_key=jax.random.fold_in(ctx.prng_key, salt),
                train=True,
            )
        if dims.residual_scale != 1.0:
            y = y * jnp.asarray(dims.residual_scale, y.dtype)
        return x + y.astype(x.dtype)
