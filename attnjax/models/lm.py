"""The decoder language model, from GPT-2 to Llama and Qwen3 by config.

GPT-2 / nanoGPT: norm="layer", positions="learned", activation="gelu",
use_bias=True, tie_embeddings=True. Llama / Qwen3: the defaults, with num_kv_heads,
qk_norm and tie_embeddings as the model has them. Gemma 2 / 3: activation="geglu",
zero_centered_norm=True, post_norm=True, embed_scale="sqrt", tie_embeddings=True, and
two mixers in turn, one with a window. `python -m attnjax.convert` reads them all.
"""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.models import backbone, mixer_choice, prefix_tokens
from attnjax.models.backbone import compute_dtype, frozen, mlp_width
from attnjax.models.stack import StackOut

__all__ = ["LM", "Config", "check", "compute_dtype", "frozen", "mlp_width", "resolve"]


@dataclasses.dataclass(frozen=True)
class Config(backbone.Config):
    """`config.model` of a language model; see also `backbone.Config`.

    Attributes:
        name: "lm".
        positions: "rope", "learned" or "none".
        max_len: longest sequence, tokens (the table of learned positions; the
            default room for generation).
        vocab_size: V, at least the tokenizer's; what is more is never seen in
            training (none: the tokenizer's).
        prefix: learned tokens in front of every document (a sink token, registers,
            meta tokens); max_len does not count them.
        tie_embeddings: the output head is the token table.
        logits_soft_cap: c in c tanh(logits / c), or none.
        embed_scale: factor on token embeddings ("sqrt" is sqrt(C)).
    """

    name: Literal["lm"] = "lm"
    positions: Literal["rope", "learned", "none"] = "rope"
    max_len: int = 1024
    vocab_size: int | None = None
    prefix: prefix_tokens.Config = dataclasses.field(
        default_factory=prefix_tokens.Config
    )
    tie_embeddings: bool = False
    logits_soft_cap: float | None = None
    embed_scale: float | Literal["sqrt"] = 1.0

    def without_learned_tokens(self) -> "Config":
        """The same without tokens in front, as baselines of equal parameters are."""
        return dataclasses.replace(self, prefix=prefix_tokens.Config())


def check(config: Config) -> None:
    """Raise UserError where settings do not fit one another."""
    backbone.check(config)
    backbone.check_ranges(
        config,
        ("max_len", "at least 1", lambda v: v >= 1),
        ("vocab_size", "at least 1", lambda v: v >= 1),
        ("logits_soft_cap", "positive", lambda v: v > 0),
    )


def resolve(given: dict) -> dict:
    """Fill and check `config.model`: JSON in, JSON out."""
    return backbone.resolve(Config, given, check=check)


def _vocab_size(config: Config, tokens: int) -> int:
    """V of a model for a tokenizer of `tokens` ids."""
    if config.vocab_size is not None and config.vocab_size < tokens:
        raise UserError(
            "config.model.vocab_size: must be at least the tokenizer's; got "
            f"vocab_size={config.vocab_size}, tokenizer {tokens}. Raise it, or set it "
            "to none."
        )
    return config.vocab_size or tokens


class Ends(nnx.Module):
    """What stands before and after the layers: embeddings, last norm, head."""

    def __init__(self, config: Config, vocab_size: int, dtype, *, rngs: nnx.Rngs):
        param_dtype = dtype_of(config.param_dtype)
        common = dict(
            std=config.init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        dim = config.embed_dim
        self.token_embedding = nn.Embedding(vocab_size, dim, **common)
        self.position_embedding = (
            nn.Embedding(config.max_len, dim, **common)
            if config.positions == "learned"
            else None
        )
        self.prefix_tokens = (
            nn.Embedding(
                config.prefix.count,
                dim,
                **(common | {"std": config.prefix.start_std(config.init_std)}),
            )
            if config.prefix.count
            else None
        )
        self.final_norm = backbone.final_norm(config, rngs=rngs)
        self.head = (
            None if config.tie_embeddings else nn.Linear(dim, vocab_size, **common)
        )


class LM(backbone.Backbone):
    """A language model: static description plus pure functions of its arrays.

    Params beside "layers": "token_embedding", "final_norm", "head",
    "position_embedding", and "prefix_tokens", the table of the learned tokens, each
    where the config has it.

    Args:
        config: `config.model`, resolved.
        vocab_size: the tokenizer's; V unless the config has a larger one.
        platform: where it will run; decides "auto" dtypes.
        target: a `kernels.Target` for kernel dispatch, or None.
    """

    def __init__(
        self, config: Config, vocab_size: int, *, platform: str = "cpu", target=None
    ):
        check(config)
        like = partial(LM, vocab_size=vocab_size, platform=platform, target=target)
        super().__init__(config, platform=platform, like=like)
        c = self.config
        self.vocab_size = _vocab_size(c, vocab_size)
        mixer_choice.check_causal(self.choices)
        self._build(
            max_len=c.max_len + c.prefix.count,
            prefix_tokens=c.prefix.count,
            rope=c.rope if c.positions == "rope" else None,
            target=target,
        )

    def _make_ends(self, rngs: nnx.Rngs) -> Ends:
        return Ends(self.config, self.vocab_size, self.dtype, rngs=rngs)

    # ---- running

    def embed(self, params: dict, tokens: jax.Array, positions: jax.Array):
        """int32 [B, T] -> [B, T, C]."""
        ends = self._merge(params)
        x = ends.token_embedding(tokens)
        scale = self.config.embed_scale
        if scale != 1.0:
            scale = math.sqrt(self.config.embed_dim) if scale == "sqrt" else scale
            x = x * jnp.asarray(scale, x.dtype)
        if ends.position_embedding is not None:
            x = x + ends.position_embedding(positions)
        return x

    def hidden(
        self, params: dict, buffers: dict, tokens: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """The normed output of the last layer.

        Args:
            params, buffers: as from `init`.
            tokens: int32 [B, T].
            ctx: positions and what else the mixers read; its `embeddings` and
                `streams` are set here.

        Returns:
            [B, T, C] in the compute dtype, and the layers' StackOut. Records cover
            the learned tokens of `config.prefix` too, which come first.
        """
        x = self.embed(params, tokens, ctx.positions)
        x, ctx = self._with_prefix(params, x, ctx)
        x, out = self.run(params, buffers, x, ctx)
        x = x[:, self.dims.prefix_tokens :]
        return ctx.spread(self._merge(params).final_norm(x)), out

    def check_packed(self) -> None:
        """Raise UserError where several documents cannot share a row."""
        if not self.dims.prefix_tokens:
            return
        prefix_tokens.check_packed(self.abstract_mixers())

    def _with_prefix(self, params, x: jax.Array, ctx: Context):
        """[B, T, C] and its surroundings with the learned tokens in front."""
        count = self.dims.prefix_tokens
        if not count:
            return x, ctx
        prefix_tokens.check_request(ctx)
        if ctx.segment_ids is not None:
            self.check_packed()
        learned = self._merge(params).prefix_tokens(jnp.arange(count))
        return prefix_tokens.put_before(learned, x), prefix_tokens.around(ctx, count)

    def _stream(self, params, start, length: int) -> jax.Array:
        start = start[:, :length]
        if start.shape[1] < length:
            raise UserError(
                f"extra stream: holds {start.shape[1]} positions; got {length}. "
                "Raise config.model.max_len."
            )
        if jnp.issubdtype(start.dtype, jnp.integer):
            if self.dims.prefix_tokens and self.config.positions == "learned":
                raise UserError(
                    "config.model.prefix: an extra stream of tokens with learned "
                    "positions has none for learned tokens; got kind="
                    f"{self.config.prefix.kind}, positions=learned. Use "
                    "positions=rope or prefix.kind=none."
                )
            return self.embed(params, start, jnp.arange(length)[None])
        return start.astype(self.dtype)

    def logits(self, params: dict, hidden: jax.Array) -> jax.Array:
        """[..., C] -> float32 (or wider) logits [..., V], soft-capped if asked."""
        ends = self._merge(params)
        head = ends.token_embedding.attend if ends.head is None else ends.head
        out = head(hidden)
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        cap = self.config.logits_soft_cap
        return out if cap is None else cap * jnp.tanh(out / cap)

    # ---- decoding

    def unstack(self, params: dict, buffers: dict) -> dict:
        """Arrays as the decoder wants them: one entry a layer. Done once."""
        if buffers["streams"] and not all(
            choice.spec.capabilities.decode for choice in self.choices.values()
        ):
            raise UserError(
                "generate: a model with extra residual streams "
                f"({', '.join(buffers['streams'])}) has no decode form."
            )
        ends = {k: v for k, v in params.items() if k != "layers"}
        layers = self.stack.unstack(params["layers"], buffers["layers"])
        return {"ends": ends, "layers": layers, "streams": buffers["streams"]}

    def init_state(self, arrays: dict, batch: int, max_len: int) -> list:
        """Decode states of all layers for `batch` sequences of `max_len` tokens; the
        learned tokens of `config.prefix` are in them."""
        count = self.dims.prefix_tokens
        room = max_len + count
        streams = {
            name: self._stream(arrays["ends"], start, room)
            for name, start in arrays["streams"].items()
        }
        layers = arrays["layers"]
        states = self.stack.init_state(layers, batch, room, streams=streams)
        if not count:
            return states
        learned = self._merge(arrays["ends"]).prefix_tokens(jnp.arange(count))
        x = jnp.broadcast_to(learned[None], (batch, *learned.shape))
        ctx = prefix_tokens.alone(count, batch).replace(embeddings=x)
        return self.stack.step(layers, states, x, ctx)[1]

    def step(
        self, arrays: dict, states: list, tokens: jax.Array, ctx: Context
    ) -> tuple[jax.Array, list]:
        """The next T >= 1 tokens [B, T] -> hidden [B, T, C] and the new states."""
        x = self.embed(arrays["ends"], tokens, ctx.positions)
        if self.dims.prefix_tokens:
            prefix_tokens.check_request(ctx)
            ctx = ctx.replace(positions=ctx.positions + self.dims.prefix_tokens)
        ctx = ctx.replace(embeddings=x)
        x, states = self.stack.step(arrays["layers"], states, x, ctx)
        return self._merge(arrays["ends"]).final_norm(x), states

    # ---- counting

    def flops(self, seq_len: int) -> float:
        """Forward FLOPs (2 a multiply-add) of one sequence of seq_len tokens, with the
        learned tokens of `config.prefix` in front of it."""
        head = 2.0 * self.config.embed_dim * self.vocab_size * seq_len
        return head + self.layer_flops(seq_len + self.dims.prefix_tokens)
