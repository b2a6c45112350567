"""One Transformer layer: a mixer and an MLP, each behind a norm and a residual."""

import dataclasses
from functools import partial
from typing import Literal

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
        zero_centered_norm: scales of norms are stored less 1.
        post_norm: what each sub-layer adds has a norm too; "only": what it reads has
            none.
        residual_scale: factor on what each sub-layer adds.
        dropout: rate on what each sub-layer adds.
        layer_scale: first value of the learned factors [C] on what each sub-layer
            adds; None leaves them out.
        drop_path: rate at which the last layer's sub-layers add nothing to a row
            in training; that of layer l of L is l / (L - 1) of it.
        num_layers: L.
        modulated: whether norms have no factors of their own and `Context.condition`
            shifts and scales what each sub-layer reads and gates what it adds.
        conv_positions: whether each sub-layer reads, and the residual stream goes on
            with, x + a depthwise convolution of 3 x 3 places of x; on grids alone.
        circular: whether the ends of the grid meet for it; else zeros are around it.
        std, out_std: initialisation of inner maps and of maps into the residual.
        dtype, param_dtype: compute and storage dtypes.
    """

    embed_dim: int
    mlp_dim: int
    activation: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6
    use_bias: bool = False
    zero_centered_norm: bool = False
    post_norm: bool | Literal["only"] = False
    residual_scale: float = 1.0
    dropout: float = 0.0
    layer_scale: float | None = None
    drop_path: float = 0.0
    num_layers: int = 1
    modulated: bool = False
    conv_positions: bool = False
    circular: bool = False
    std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); extra streams run through both.

    With `post_norm` x + norm(mixer(norm(x))), and the same for the MLP: Gemma 2,
    arXiv 2408.00118, section 2; "only": x + norm(mixer(x)), the residual post-norm of
    Liu et al., arXiv 2111.09883, section 3.2. Layer-scale: Touvron et al., arXiv
    2103.17239, eq. 4. Drop-path is the stochastic depth of Huang et al., arXiv
    1603.09382, a row at a time; extra streams, which all rows share, are never dropped.

    With `modulated` x + gate mixer(norm(x) (1 + scale) + shift), and the same for the
    MLP (adaLN-Zero of Peebles and Xie, arXiv 2212.09748, section 3.2); extra streams,
    which belong to no row, are neither shifted nor gated.

    With `conv_positions` x becomes x + conv(x) in front of each sub-layer, the
    conditional positions of Chu et al., arXiv 2102.10882, section 3.2, as DaViT has
    them (arXiv 2204.03645, the authors' code).
    """

    def __init__(self, make_mixer, dims: BlockDims, *, rngs: nnx.Rngs):
        norm = partial(
            nn.make_norm,
            dims.norm,
            dims.embed_dim,
            eps=dims.norm_eps,
            use_bias=dims.use_bias,
            zero_centered=dims.zero_centered_norm,
            learned=not dims.modulated,
            param_dtype=jnp.dtype(dims.param_dtype),
            rngs=rngs,
        )
        self.dims = dims
        self.has_mlp = dims.mlp_dim > 0
        self.modulation = self._modulation(rngs)
        self.conv_mixer = self._convolution(rngs)
        reads_normed = dims.post_norm != "only"
        self.norm_mixer = norm() if reads_normed else None
        self.post_norm_mixer = norm() if dims.post_norm else None
        self.mixer = make_mixer(rngs=rngs)
        self.reads_residual = getattr(self.mixer, "reads_residual", False)
        self.layer_scale_mixer = self._layer_scale(rngs)
        if self.has_mlp:
            self.conv_mlp = self._convolution(rngs)
            self.norm_mlp = norm() if reads_normed else None
            self.post_norm_mlp = norm() if dims.post_norm else None
            self.layer_scale_mlp = self._layer_scale(rngs)
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

    def _modulation(self, rngs: nnx.Rngs):
        """Three vectors of C for each sub-layer, or None."""
        dims = self.dims
        if not dims.modulated:
            return None
        return nn.Modulation(
            dims.embed_dim,
            6 if self.has_mlp else 3,
            dtype=jnp.dtype(dims.dtype),
            param_dtype=jnp.dtype(dims.param_dtype),
            rngs=rngs,
        )

    def _convolution(self, rngs: nnx.Rngs):
        """The positions in front of one sub-layer, or None."""
        dims = self.dims
        if not dims.conv_positions:
            return None
        return nn.DepthwiseConvolution(
            dims.embed_dim,
            circular=dims.circular,
            use_bias=dims.use_bias,
            dtype=jnp.dtype(dims.dtype),
            param_dtype=jnp.dtype(dims.param_dtype),
            rngs=rngs,
        )

    def _layer_scale(self, rngs: nnx.Rngs):
        """The factors of one sub-layer, or None."""
        dims = self.dims
        if dims.layer_scale is None:
            return None
        start = jax.nn.initializers.constant(dims.layer_scale)
        dtype = jnp.dtype(dims.param_dtype)
        return nn.param(rngs, (dims.embed_dim,), start, dtype=dtype)

    def __call__(
        self, x: jax.Array, streams: dict, ctx: Context
    ) -> tuple[jax.Array, dict, MixerOut]:
        """[B, T, C] and the raw streams -> the same, and the mixer's MixerOut."""
        ctx = ctx.replace(streams=self.normed(streams))
        steered = self.steered(ctx)
        x, read = self.read(x, steered, ctx)
        told = ctx.replace(residual=x) if self.reads_residual else ctx
        if getattr(self.mixer, "takes_norm", False):
            norm = partial(self._normed, steered=steered)
            y, out = self.mixer(x, told, norm=norm)
        else:
            y, out = self.mixer(read, told)
        if streams:
            streams = self.run_streams(streams, ctx, added=out.streams)
        return self.write(x, y, steered, ctx), streams, out

    def read(self, x: jax.Array, steered, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """[B, T, C] -> x with its positions, and what the mixer reads of it."""
        x = _placed(x, self.conv_mixer, ctx)
        return x, self._normed(x, steered)

    def _normed(self, x: jax.Array, steered) -> jax.Array:
        """What the mixer reads of [B, T, C]."""
        return _read(_through(self.norm_mixer, x), steered[:3])

    def write(self, x: jax.Array, y: jax.Array, steered, ctx: Context) -> jax.Array:
        """x [B, T, C] with what the mixer gave, y, and with what the MLP adds."""
        x = self._add(x, _gated(self._of_mixer(y), steered[:3]), ctx, 0)
        if self.has_mlp:
            x = _placed(x, self.conv_mlp, ctx)
            y = self._of_mlp(x, steered[3:])
            x = self._add(x, _gated(y, steered[3:]), ctx, 1)
        return x

    def steered(self, ctx: Context) -> list[jax.Array]:
        """Shift, scale and gate of each sub-layer; nothing without a modulation."""
        if self.modulation is None:
            return []
        if ctx.condition is None:
            raise ValueError(
                "Block: modulated layers need a condition; got ctx.condition=None."
            )
        return self.modulation(ctx.condition)

    def normed(self, streams: dict) -> dict:
        """Extra streams as the mixer reads them."""
        return {name: _through(self.norm_mixer, s) for name, s in streams.items()}

    def run_streams(self, streams: dict, ctx: Context, *, added=()) -> dict:
        """The raw extra streams [1, S, C] after this layer.

        Losses, records and running means are those of x: of a stream's own pass only
        what it adds to the stream is kept.

        Args:
            ctx: its `streams` are the normed ones.
            added: by name, what the mixer has already worked out.
        """
        alone = _alone(ctx, streams)
        before = nnx.to_pure_dict(nnx.state(self.mixer, nn.Buffer))
        after = {}
        for name, stream in streams.items():
            if name in added:
                y = added[name]
            else:
                y, out = self.mixer(ctx.streams[name], alone)
                y = out.streams.get(name, y)
            after[name] = self._add(stream, self._of_mixer(y), ctx, 2)
        if before:
            kept = nnx.state(self.mixer, nn.Buffer)
            nnx.replace_by_pure_dict(kept, before)
            nnx.update(self.mixer, kept)
        if self.has_mlp:
            after = {
                name: self._add(s, self._of_mlp(s), ctx, 3) for name, s in after.items()
            }
        return after

    def step(self, x: jax.Array, state, ctx: Context):
        """The same for decoding: [B, T, C] and the mixer's state -> both."""
        y, state = self.mixer.step(_through(self.norm_mixer, x), state, ctx)
        x = self._add(x, self._of_mixer(y), ctx, 0)
        if self.has_mlp:
            x = self._add(x, self._of_mlp(x), ctx, 1)
        return x, state

    def _of_mixer(self, y):
        """What the mixer adds."""
        return _scaled(_through(self.post_norm_mixer, y), self.layer_scale_mixer)

    def _of_mlp(self, x, steered=()):
        """What the MLP adds to x."""
        y = self.mlp(_read(_through(self.norm_mlp, x), steered))
        return _scaled(_through(self.post_norm_mlp, y), self.layer_scale_mlp)

    def _add(self, x, y, ctx: Context, salt: int):
        dims = self.dims
        if dims.dropout and ctx.train:
            y = nn.dropout(
                y,
                dims.dropout,
                prng_key=jax.random.fold_in(ctx.prng_key, salt),
                train=True,
            )
        if dims.drop_path and ctx.train and salt in (0, 1):
            y = nn.drop_path(
                y,
                dims.drop_path * self._depth(ctx),
                prng_key=jax.random.fold_in(ctx.prng_key, 8 + salt),
            )
        if dims.residual_scale != 1.0:
            y = y * jnp.asarray(dims.residual_scale, y.dtype)
        return x + y.astype(x.dtype)

    def _depth(self, ctx: Context) -> jax.Array:
        """float32 scalar: 0 at the first layer, 1 at the last."""
        last = self.dims.num_layers - 1
        return ctx.layer_index / jnp.float32(last) if last else jnp.float32(1)


def _placed(x: jax.Array, conv, ctx: Context) -> jax.Array:
    """x with the positions that a convolution gives it."""
    if conv is None:
        return x
    return x + conv(x, ctx.grid, extra_tokens=ctx.extra_tokens).astype(x.dtype)


def _through(norm, x: jax.Array) -> jax.Array:
    """x behind a norm, where there is one."""
    return x if norm is None else norm(x)


def _read(x: jax.Array, steered) -> jax.Array:
    """What a sub-layer reads: shifted and scaled, where it is steered."""
    return nn.shifted(x, *steered[:2]) if steered else x


def _gated(y: jax.Array, steered) -> jax.Array:
    """What a sub-layer adds: gated, where it is steered."""
    return y * steered[2].astype(y.dtype) if steered else y


def _scaled(y: jax.Array, scale) -> jax.Array:
    """What a sub-layer adds, times its layer-scale."""
    return y if scale is None else y * scale[...].astype(y.dtype)


def _alone(ctx: Context, streams: dict) -> Context:
    """The surroundings of an extra stream: one document from its first position."""
    length = max((s.shape[1] for s in streams.values()), default=0)
    return ctx.replace(
        positions=jnp.arange(length, dtype=jnp.int32)[None],
        segment_ids=None,
        prefix_len=None,
        memory=None,
        memory_segment_ids=None,
        embeddings=None,
        condition=None,
        interventions={},
        mask=None,
        hooks=(),
        rows=None,
        sequence_form=None,
        places=None,
    )
