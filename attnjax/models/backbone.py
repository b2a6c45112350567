"""What all models share: layers of configured mixers between ends of their own.

A model adds what stands before and after its layers (`_make_ends`), what its mixers
are told (`_build`), and its own passes over `run`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.core import schema
from attnjax.core.context import Carried, Context, carried_starts
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError, unknown
from attnjax.core.spec import MixerDims
from attnjax.models import matching, mixer_choice, schedule
from attnjax.models.block import Block, BlockDims
from attnjax.models.layout import Layout
from attnjax.models.stack import Stack, StackOut, joined


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of `config.model` that every model has.

    Attributes:
        name: the kind of model.
        layers: a schedule string, or a list with one instance name a layer.
        num_layers: depth; the schedule repeats to fill it (none: as it is).
        embed_dim: C.
        num_heads: H query heads.
        num_kv_heads: K key/value heads (none: H).
        head_dim: D (none: C / H).
        mlp_dim: MLP width M (none: 4 C, or 8 C / 3 up to a multiple of 64 for a
            gated activation; 0: no MLP).
        params: "match": the MLPs get the width at which the model has as many
            parameters as the baseline of `match`; a number: that many; none: mlp_dim
            stands.
        match: the baseline of params=match, and the steps of the width.
        activation: one of nn.ACTIVATIONS.
        norm: "rms" or "layer".
        norm_eps: its epsilon.
        zero_centered_norm: scales of norms (of layers, the end, queries and keys)
            are stored less 1, so that weight decay draws them to 1.
        post_norm: norm also what each sub-layer adds, before it is added; "only": norm
            that, and not what the sub-layer reads.
        use_bias: biases in linear maps and layer norms.
        qk_norm: RMSNorm of each head's query and key.
        positions: how the model knows the places of its tokens.
        rope: rotary settings.
        residual_scale: factor on what each sub-layer adds.
        dropout: rate on embeddings and on what each sub-layer adds.
        init_std: standard deviation of weights at the start.
        scale_out_init: divide it by sqrt(2 L) for maps into the residual stream.
        dtype: compute dtype ("auto": bfloat16 on accelerators, float32 on CPU).
        param_dtype: storage dtype.
        remat: "none", "dots" (keep matrix products) or "full".
        unroll: repeats a scan iteration runs, or "all".
        kernel: implementation for kernels.attention.
        mixers: settings by instance name.
    """

    name: str
    layers: str | tuple[str, ...] = "attention"
    num_layers: int | None = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    params: int | Literal["match"] | None = None
    match: matching.Config = dataclasses.field(default_factory=matching.Config)
    activation: str = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    post_norm: bool | Literal["only"] = False
    use_bias: bool = False
    qk_norm: bool = False
    positions: str = "none"
    rope: nn.Rope = dataclasses.field(default_factory=nn.Rope)
    residual_scale: float = 1.0
    dropout: float = 0.0
    init_std: float = 0.02
    scale_out_init: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["none", "dots", "full"] = "dots"
    unroll: int | Literal["all"] = 1
    kernel: str = "auto"
    mixers: schema.Deferred = dataclasses.field(default_factory=dict)

    def schedule(self) -> tuple[str, ...]:
        """The instance name of each layer."""
        return schedule.expand(self.layers, self.num_layers)

    def mlp_parameters_per_unit(self) -> float:
        """Parameters that all MLPs together have for a unit of `mlp_dim`."""
        one = nn.mlp_parameters_per_unit(
            self.embed_dim, activation=self.activation, use_bias=self.use_bias
        )
        return len(self.schedule()) * one

    def without_learned_tokens(self) -> "Config":
        """The same without extra tokens, as baselines of equal parameters are."""
        return self


def check(config: Config) -> None:
    """Raise UserError where settings do not fit one another."""
    if config.activation not in nn.ACTIVATIONS:
        raise unknown(
            "config.model.activation", "activation", config.activation, nn.ACTIVATIONS
        )
    check_ranges(
        config,
        ("embed_dim", "at least 1", lambda v: v >= 1),
        ("num_heads", "at least 1", lambda v: v >= 1),
        ("head_dim", "at least 1", lambda v: v >= 1),
        ("mlp_dim", "at least 0", lambda v: v >= 0),
        ("norm_eps", "positive", lambda v: v > 0),
        ("init_std", "at least 0", lambda v: v >= 0),
        ("dropout", "in [0, 1)", lambda v: 0 <= v < 1),
        ("unroll", "at least 1, or 'all'", lambda v: v == "all" or v >= 1),
    )
    matching.check(config)
    _check_heads(config)
    wide = "float64" in (config.dtype, config.param_dtype)
    if wide and not jax.config.jax_enable_x64:
        raise UserError(
            "config.model.dtype: float64 needs 64-bit arrays; got "
            f"dtype={config.dtype}, param_dtype={config.param_dtype} without them. "
            "Set the environment variable JAX_ENABLE_X64=1."
        )


def resolve(
    kind: type,
    given: dict,
    *,
    check: Callable[[Any], None],
    sized: Callable[[Any], Any] = lambda config: config,
    check_choices: Callable[[Any, dict], None] | None = None,
) -> dict:
    """Fill and check `config.model`: JSON in, JSON out. What `sized` gives stays none,
    so that another size can be laid over it.

    Args:
        kind: the model's Config.
        given: `config.model`.
        check: (config) -> None; raises where settings do not fit.
        sized: (config) -> the same with the numbers of its size.
        check_choices: (config, {instance: Choice}) -> None, for the mechanisms; none:
            the model checks them where it is built.

    Raises:
        UserError: for a setting, mechanism or option that does not fit.
    """
    filled = schema.resolve(kind, given, path="config.model")
    config = sized(schema.build(kind, filled, path="config.model"))
    check(config)
    mixers = mixer_choice.resolve_mixers(config.schedule(), filled["mixers"])
    filled["mixers"] = mixers
    if check_choices is not None:
        check_choices(config, mixer_choice.choices(mixers))
    return filled


def check_ranges(config: Config, *rules: tuple[str, str, Callable]) -> None:
    """Raise UserError unless every option that is not none fulfils its rule.

    Args:
        rules: (option, the rule in words, whether a value fulfils it).
    """
    for name, rule, is_good in rules:
        value = getattr(config, name)
        if value is not None and not is_good(value):
            raise UserError(f"config.model.{name}: must be {rule}; got {value}.")


def _check_heads(config: Config) -> None:
    if config.head_dim is None and config.embed_dim % config.num_heads:
        divisors = [h for h in range(1, 65) if config.embed_dim % h == 0]
        raise UserError(
            "config.model.num_heads: must divide embed_dim when head_dim is none; got "
            f"num_heads={config.num_heads}, embed_dim={config.embed_dim}. Use one of "
            f"{divisors}, or set config.model.head_dim."
        )
    if config.num_kv_heads is not None and (
        config.num_kv_heads < 1 or config.num_heads % config.num_kv_heads
    ):
        divisors = [
            k for k in range(1, config.num_heads + 1) if config.num_heads % k == 0
        ]
        raise UserError(
            "config.model.num_kv_heads: must divide num_heads; got num_kv_heads="
            f"{config.num_kv_heads}, num_heads={config.num_heads}. Use one of "
            f"{divisors}."
        )
    head_dim = head_width(config)
    if config.positions == "rope" and head_dim % 2:
        raise UserError(
            f"config.model.head_dim: must be even for rotary positions; got {head_dim}."
            " Change num_heads or head_dim, or set config.model.positions=none."
        )


def head_width(config: Config) -> int:
    """D, with its default worked out."""
    return config.head_dim or config.embed_dim // config.num_heads


def mlp_width(config: Config) -> int:
    """M, with its default worked out."""
    if config.mlp_dim is not None:
        return config.mlp_dim
    if nn.ACTIVATIONS[config.activation][1]:
        return 64 * math.ceil(8 * config.embed_dim / 3 / 64)
    return 4 * config.embed_dim


def frozen(config: Config, width: int) -> Config:
    """The config of a model whose MLP width has been found."""
    return dataclasses.replace(
        config, params=None, match=matching.Config(), mlp_dim=width
    )


def compute_dtype(config: Config, platform: str) -> str:
    """The name of the compute dtype on `platform` ("cpu", "gpu", "tpu")."""
    if config.dtype == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    return config.dtype


def final_norm(config: Config, *, rngs: nnx.Rngs) -> nnx.Module:
    """The norm behind the last layer."""
    return nn.make_norm(
        config.norm,
        config.embed_dim,
        eps=config.norm_eps,
        use_bias=config.use_bias,
        zero_centered=config.zero_centered_norm,
        param_dtype=dtype_of(config.param_dtype),
        rngs=rngs,
    )


class Backbone:
    """The layers of a model: static description plus pure functions of its arrays.

    Args:
        config: `config.model`, resolved and checked.
        platform: where it will run; decides "auto" dtypes.
        like: (config) -> the same model with other settings, to count parameters.

    Attributes:
        config: with the width of the MLPs settled; `matched` says how, where
            `config.params` asked for it.
        names: the instance name of each layer.
        choices: the mechanism of each instance.
        dims, block_dims, layout, stack: of the layers, from `_build`.
        carried: what layers hand on beside the residual stream, by name.
    """

    # Whether it makes one vector of all tokens, which `Carried.weighs` may weigh.
    pools_tokens = False

    def __init__(self, config: Config, *, platform: str, like: Callable):
        self.names = config.schedule()
        self.matched = None
        if config.params is not None:
            self.matched = matching.solve(
                config,
                width=mlp_width(config),
                depth=len(self.names),
                count=lambda c: like(c).parameter_count(),
            )
            config = frozen(config, self.matched.mlp_dim)
        self.config = config
        self.dtype = dtype_of(compute_dtype(config, platform))
        mixers = mixer_choice.resolve_mixers(self.names, config.mixers)
        self.choices = mixer_choice.choices(mixers)

    # ---- building

    def _build(
        self, *, layout: Layout | None = None, groups: range | None = None, **own
    ) -> None:
        """Lay out layers and ends.

        Args:
            layout, groups: the whole model's layout and the groups of it that these
                layers are, where they are not the whole model.
            own: the model's fields of MixerDims.
        """
        self.layout = Layout.of(self.names) if layout is None else layout
        self.dims = self._mixer_dims(**own)
        self.block_dims = self._block_dims()
        self.stack = Stack(
            self.layout,
            self._make_block,
            remat=self.config.remat,
            unroll=self.config.unroll,
            groups=groups,
        )
        ends = nnx.eval_shape(lambda: self._make_ends(nnx.Rngs(0)))
        self._ends, _ = nnx.split(ends, nnx.Param)
        self.carried = self._carried()

    def _mixer_dims(self, **own) -> MixerDims:
        c = self.config
        std, out_std = self._stds()
        return MixerDims(
            embed_dim=c.embed_dim,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads or c.num_heads,
            head_dim=head_width(c),
            num_layers=len(self.layout.names),
            qk_norm=c.qk_norm,
            norm=c.norm,
            norm_eps=c.norm_eps,
            zero_centered_norm=c.zero_centered_norm,
            use_bias=c.use_bias,
            init_std=std,
            out_init_std=out_std,
            dropout=0.0,
            dtype=jnp.dtype(self.dtype).name,
            param_dtype=c.param_dtype,
            kernel=c.kernel,
            **own,
        )

    def _stds(self) -> tuple[float, float]:
        """Standard deviations of maps at the start: of the mixers' inner ones, and of
        those into the residual stream."""
        c = self.config
        depth = len(self.layout.names)
        out_std = c.init_std / math.sqrt(2 * depth) if c.scale_out_init else c.init_std
        return c.init_std, out_std

    def _block_dims(self, **own) -> BlockDims:
        c, d = self.config, self.dims
        return BlockDims(
            embed_dim=c.embed_dim,
            mlp_dim=mlp_width(c),
            activation=c.activation,
            norm=c.norm,
            norm_eps=c.norm_eps,
            zero_centered_norm=c.zero_centered_norm,
            post_norm=c.post_norm,
            use_bias=c.use_bias,
            residual_scale=c.residual_scale,
            dropout=c.dropout,
            std=d.init_std,
            out_std=d.out_init_std,
            dtype=d.dtype,
            param_dtype=d.param_dtype,
            **own,
        )

    def _make_block(self, name: str, *, rngs: nnx.Rngs) -> Block:
        choice = self.choices[name]
        return Block(
            lambda *, rngs: choice.make(self.dims, rngs=rngs),
            self.block_dims,
            rngs=rngs,
        )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Those of all layers, in order."""
        return (self.stack,)

    def _make_ends(self, rngs: nnx.Rngs) -> nnx.Module:
        """What stands before and after the layers."""
        raise NotImplementedError

    def init(self, seed: int | jax.Array) -> tuple[dict, dict]:
        """(params, buffers) from (seed, parameter path); call it under jax.jit.

        Params: those of the ends by name, and "layers", stacked by `self.layout`.
        Buffers: "layers", and "streams" where a mixer asks for extra residual streams.
        """
        key = jax.random.key(seed)
        params = nn.materialize(self._make_ends(nnx.Rngs(params=key)), key)
        params["layers"], layer_buffers = {}, {}
        for stack in self.stacks:
            own, state = stack.init(key)
            params["layers"] |= own
            layer_buffers |= state
        return params, {"layers": layer_buffers, "streams": self._streams(key)}

    def _streams(self, key: jax.Array) -> dict:
        """Starts of the extra streams: arrays [1, S, C], or token ids [1, S]."""
        streams: dict = {}
        for choice in self.choices.values():
            make = getattr(choice.module, "streams", None)
            if make is not None:
                # Not by instance: what has one name is one stream, for all of them.
                own = nn.parameter.path_key(key, ("streams", choice.spec.name))
                streams |= make(choice.config, self.dims, own)
        return streams

    def _carried(self) -> dict[str, Carried]:
        """What layers hand on, of all instances.

        Raises:
            UserError: where two of them, or the model, do not agree with it.
        """
        found: dict[str, Carried] = {}
        for choice in self.choices.values():
            make = getattr(choice.module, "carried", None)
            for name, one in (make(choice.config, self.dims) if make else {}).items():
                self._check_carried(choice, name, one, found.get(name, one))
                found[name] = one
        if found and jax.eval_shape(self._streams, jax.random.key(0)):
            raise UserError(
                "config.model.layers: extra residual streams do not go through layers "
                f"that hand on numbers of each token; got {', '.join(self.choices)}. "
                "Keep one kind of them."
            )
        return found

    def _check_carried(self, choice, name: str, one: Carried, before: Carried) -> None:
        path = f"config.model.mixers.{choice.instance}"
        if one != before:
            raise UserError(
                f"{path}: hands on {name!r} otherwise than another instance; got {one} "
                f"and {before}. Give both the same settings of it."
            )
        if one.weighs in ("normed", "residual") and not self.pools_tokens:
            raise UserError(
                f"{path}: config.model.name={self.config.name} makes no one vector of "
                f"all tokens, whose features {name!r} could weigh; got {one.weighs!r}. "
                "Leave it at auto."
            )

    # ---- running

    def weighed(self, x: jax.Array, out: StackOut, place: str) -> jax.Array:
        """Features [B, T, C] times what layers hand on to weigh them.

        Args:
            out: of the layers.
            place: "residual" or "normed", what x is.
        """
        for name, one in self.carried.items():
            weighs = one.weighs
            if weighs == "auto":
                weighs = "normed" if self.pools_tokens else "none"
            if weighs == place:
                x = x * out.carried[name][..., None].astype(x.dtype)
        return x

    def _merge(self, params: dict) -> nnx.Module:
        """The ends with their arrays."""
        return nnx.merge(self._ends, {k: v for k, v in params.items() if k != "layers"})

    def _stream(self, params: dict, start: jax.Array, length: int) -> jax.Array:
        """An extra stream [1, length, C] from its start."""
        raise NotImplementedError

    def run(
        self, params: dict, buffers: dict, x: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """All layers on embeddings.

        Args:
            params, buffers: as from `init`.
            x: [B, T, C].
            ctx: its `embeddings`, `streams` and `carried` are set here.

        Returns:
            [B, T, C], not normed, and the layers' StackOut with the model's buffers.
        """
        x = ctx.spread(x)
        streams = {
            name: self._stream(params, start, x.shape[1])
            for name, start in buffers["streams"].items()
        }
        if self.config.dropout and ctx.train:
            key = jax.random.fold_in(ctx.prng_key, 0x7FFFFFFF)
            x = nn.dropout(x, self.config.dropout, prng_key=key, train=True)
        carried = carried_starts(self.carried, x.shape[:2], x.dtype)
        carried = {name: ctx.spread(start) for name, start in carried.items()}
        ctx = ctx.replace(embeddings=x, streams=streams, carried=carried)
        parts = []
        for stack in self.stacks:
            x, part = stack.part(params["layers"], buffers["layers"], x, ctx)
            ctx = ctx.replace(streams=part.streams, carried=part.carried)
            parts.append(part)
        out = joined(parts)
        whole = buffers | {"layers": out.buffers}
        return x, dataclasses.replace(out, buffers=whole)

    def abstract_mixers(self) -> dict[str, nnx.Module]:
        """Each instance's module, without arrays."""
        make = {
            name: partial(choice.make, self.dims)
            for name, choice in self.choices.items()
        }
        return {
            name: nnx.eval_shape(lambda one=one: one(rngs=nnx.Rngs(0)))
            for name, one in make.items()
        }

    # ---- counting

    def parameter_count(self) -> int:
        """Number of parameters, from the shapes of `init`."""
        params, _ = jax.eval_shape(self.init, 0)
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))

    def layer_flops(self, length: int) -> float:
        """Forward FLOPs (2 a multiply-add) of all layers on `length` tokens."""
        b = self.block_dims
        maps = 3 if nn.ACTIVATIONS[b.activation][1] else 2
        mlp = 2.0 * maps * b.embed_dim * b.mlp_dim * length
        total = 0.0
        for name in self.names:
            choice = self.choices[name]
            total += choice.spec.flops(choice.config, self.dims, length) + mlp
        return total
