"""A layer of two streams, text and image, that meet in one attention.

Source: Esser et al. (Stable Diffusion 3), arXiv 2403.03206, figure 2b; its released
code for the last layer.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context, MixerOut
from attnjax.mixers.slots import joint
from attnjax.models.block import Block, BlockDims

# Text must draw other dropout than the image of the same layer.
TEXT_SALT = 0x7E87


class Silent(nnx.Module):
    """The text stream of the last layer: it is seen, and goes no further.

    A norm, shifted and scaled by the condition, and the maps of attention without that
    of the output. Its tokens ask too, as in the released code, so that a row of weights
    exists for every token of every layer; nothing reads the answers, and the map of
    their queries learns nothing.
    """

    def __init__(self, make_mixer: Callable, dims: BlockDims, *, rngs: nnx.Rngs):
        stored = dict(dtype=jnp.dtype(dims.dtype), rngs=rngs)
        stored["param_dtype"] = jnp.dtype(dims.param_dtype)
        self.modulation = nn.Modulation(dims.embed_dim, 2, **stored)
        self.norm_mixer = nn.make_norm(
            dims.norm,
            dims.embed_dim,
            eps=dims.norm_eps,
            learned=False,
            param_dtype=stored["param_dtype"],
            rngs=rngs,
        )
        self.mixer = make_mixer(rngs=rngs)

    def steered(self, ctx: Context) -> list[jax.Array]:
        """Shift and scale."""
        return self.modulation(ctx.condition)

    def read(self, x: jax.Array, steered, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """[B, M, C] -> x, and what the mixer reads of it."""
        del ctx
        return x, nn.shifted(self.norm_mixer(x), *steered)

    def write(self, x: jax.Array, y: None, steered, ctx: Context) -> jax.Array:
        """x: nothing is added."""
        del y, steered, ctx
        return x


class JointBlock(nnx.Module):
    """text, image -> each of them through its own modulated `Block`, but for the one
    attention of all tokens.

    Rows hold the text first: x is [B, M + N, C] with M = `Context.extra_tokens` tokens
    of text, and the places of the image's grid behind them.

    Args:
        make_mixer: (rngs=) -> an `attention.Mixer`; called once a stream.
        dims: of both streams.
        is_last: whether nothing reads the text behind this layer.
    """

    def __init__(
        self,
        make_mixer: Callable,
        dims: BlockDims,
        *,
        is_last: bool = False,
        rngs: nnx.Rngs,
    ):
        def of_stream(is_first: bool) -> Callable:
            def make(*, rngs):
                mixer = make_mixer(rngs=rngs)
                has_output = not (is_first and is_last)
                joint.prepare(mixer, is_first=is_first, has_output=has_output)
                return mixer

            return make

        dims = dataclasses.replace(dims, modulated=True)
        kind = Silent if is_last else Block
        self.text = kind(of_stream(True), dims, rngs=rngs)
        self.image = Block(of_stream(False), dims, rngs=rngs)

    def __call__(
        self, x: jax.Array, streams: dict, ctx: Context
    ) -> tuple[jax.Array, dict, MixerOut]:
        """[B, M + N, C] -> the same, and what the attention reports."""
        blocks = (self.text, self.image)
        parts = jnp.split(x, [ctx.extra_tokens], axis=1)
        steered = [block.steered(ctx) for block in blocks]
        contexts = (_apart(ctx), ctx)
        made = [
            block.read(part, how, own)
            for block, part, how, own in zip(
                blocks, parts, steered, contexts, strict=True
            )
        ]
        mixers = (self.text.mixer, self.image.mixer)
        ys, out = joint.attend(mixers, (made[0][1], made[1][1]), ctx)
        parts = [
            block.write(part, y, how, own)
            for block, (part, _), y, how, own in zip(
                blocks, made, ys, steered, contexts, strict=True
            )
        ]
        return jnp.concatenate(parts, axis=1), streams, out


def _apart(ctx: Context) -> Context:
    """`ctx` with randomness of its own."""
    if ctx.prng_key is None:
        return ctx
    return ctx.replace(prng_key=jax.random.fold_in(ctx.prng_key, TEXT_SALT))
