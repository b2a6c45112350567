"""Attention inside the windows of a grid, and layers of two such parts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Context, MixerOut
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.slots import options
from attnjax.mixers.slots.base import Call
from attnjax.mixers.slots.windows import Windows, check_request_on_grid

# Hooks for which all pairs of tokens are computed, [B, H, T, T].
LAID_OPEN = ("scores", "weights")


class Windowed(attention.Mixer):
    """A layer of `attention` whose tokens see those of their window and the extra
    tokens; extra tokens see all.

    Args:
        config: the layer.
        dims: of the model.
        windows: how its grid is cut.
        owner: the mechanism, for messages.
    """

    def __init__(
        self,
        config: attention.Config,
        dims: MixerDims,
        *,
        windows: Windows,
        owner: str,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dims, rngs=rngs)
        self.windows, self.owner = windows, owner
        refuse_attend(self, owner)

    def known_hooks(self) -> tuple[str, ...]:
        """Those of `attention`; scores and weights are [B, H, T, T], where what is
        seen are tokens alone."""
        known = super().known_hooks()
        if self.windows.masked:
            return known
        return tuple(what for what in known if what not in LAID_OPEN)

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """(query [B, T, H, D], key [B, T, K, D], value [B, T, K, E]) to the heads
        [B, T, H, E]: one call with a row for each window, one for the extra tokens."""
        extra, spec = call.ctx.extra_tokens, spec or self.spec
        if any(hook.what in LAID_OPEN for hook in call.ctx.hooks):
            return self._laid_open(x, qkv, operands, call, spec)
        own, more = self.of_windows(spec, call)
        seen, ids = self.mask_of_windows(mask, len(x), extra)
        query, key, value = qkv
        rows = (
            self.rows(query[:, extra:]),
            self.key_rows(key, extra),
            self.key_rows(value, extra),
        )
        visible = self.windows.visible()
        if visible is not None:
            # Extra tokens come first and are always there.
            there = np.pad(visible, ((0, 0), (extra, 0)), constant_values=True)
            more = more | {"kv_mask": jnp.asarray(np.tile(there, (len(x), 1)))}
        arrays = operands | more | ids
        heads = super().attend(x, rows, seen, arrays, call, spec=own)
        heads = heads.reshape(len(x), self.windows.count, *heads.shape[1:])
        heads = self.windows.unfold(heads)
        if not extra:
            return heads
        whole = (query[:, :extra], key, value)
        first = super().attend(x, whole, mask, operands, call, spec=spec)
        return jnp.concatenate([first, heads], axis=1)

    def rows(self, a: jax.Array) -> jax.Array:
        """What belongs to queries, [B, prod(grid), ...] -> [B N, L, ...]."""
        return _joined(self.windows.fold(a))

    def key_rows(self, a: jax.Array, extra: int) -> jax.Array:
        """Keys or values [B, T, ...] -> [B N, S, ...], what each window sees."""
        rows = self.windows.fold_seen(a[:, extra:])
        if extra:
            shape = (*rows.shape[:2], extra, *rows.shape[3:])
            first = jnp.broadcast_to(a[:, None, :extra], shape)
            rows = jnp.concatenate([first, rows], axis=2)
        return _joined(rows)

    def _laid_open(self, x, qkv, operands: dict, call: Call, spec):
        """The same with all pairs of tokens, for hooks on them."""
        extra = call.ctx.extra_tokens
        sees = np.pad(self.windows.sees(), (extra, 0), constant_values=True)
        operands = operands | {"sees": jnp.asarray(sees)}
        bias = self.bias_of_tokens(call)
        if bias is not None:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (extra, 0), (extra, 0)))
            spec = dataclasses.replace(spec, score=(kernels.Bias(), *spec.score))
            operands = operands | {"bias": bias}
        mask = kernels.MaskFn(entry_of, ("sees",), ("table",))
        return super().attend(x, qkv, mask, operands, call, spec=spec)

    def bias_of_tokens(self, call: Call) -> jax.Array | None:
        """What `of_windows` adds to the scores of the grid's tokens, [B or 1, H, T, T]
        and anything where they do not see one another; None for nothing."""
        del call
        return None

    def mask_of_windows(
        self, mask: kernels.Mask, batch: int, extra: int
    ) -> tuple[kernels.Mask, dict[str, jax.Array]]:
        """What is seen inside the rows of `of_windows`, and its arrays."""
        del batch, extra
        return mask, {}

    def init_state(self, batch: int, max_len: int, memory=None):
        """Refused: what a grid holds is seen at once."""
        del batch, max_len, memory
        raise no_decode_form(self.owner, self.dims)

    def step(self, x: jax.Array, state, ctx: Context):
        """Refused as well."""
        del x, state, ctx
        raise no_decode_form(self.owner, self.dims)

    def of_windows(
        self, spec: kernels.AttentionSpec, call: Call
    ) -> tuple[kernels.AttentionSpec, dict[str, jax.Array]]:
        """The computation of rows [B N, L or S, ...] and its arrays; the extra tokens
        stand in front of the keys of each."""
        del call
        return spec, {}


def entry_of(b, h, q, k, table) -> jax.Array:
    """table[q, k]: the rule of a mask that is written out."""
    del b, h
    return table[q, k]


def _joined(rows: jax.Array) -> jax.Array:
    """[B, N, ...] -> [B N, ...]."""
    return rows.reshape(-1, *rows.shape[2:])


def with_bias(
    spec: kernels.AttentionSpec, table: jax.Array, extra: int
) -> tuple[kernels.AttentionSpec, dict[str, jax.Array]]:
    """Scores with a bias of each query and key of a window, [H, L, S]."""
    table = jnp.pad(table, ((0, 0), (0, 0), (extra, 0)))[None]
    spec = dataclasses.replace(spec, score=(*spec.score, kernels.Bias()))
    return spec, {"bias": table}


def refuse_attend(layer: attention.Mixer, owner: str) -> None:
    """Raise UserError where an output option changes how whole rows attend."""
    options.refuse_changes(
        layer.slots(),
        ("attend",),
        layer.shape,
        layer.dims,
        owner=owner,
        why="rows of the kernel are its own, not those of the tokens",
    )


class Parts(nnx.Module):
    """A layer of one part, or of two: side by side, f(x) + g(x), or g behind f,
    f(x) + g(norm(x + f(x))).

    Parameters: those of each part under its name, and `between`, the norm.

    Args:
        spec: of the mechanism with these settings.
        dims: of the model.
        parts: name -> maker of one part, in order.
        parallel: whether two parts are side by side.
    """

    def __init__(
        self,
        spec: MixerSpec,
        dims: MixerDims,
        parts: dict[str, Callable],
        *,
        parallel: bool,
        rngs: nnx.Rngs,
    ):
        self.own_spec, self.dims = spec, dims
        self.part_names = tuple(parts)
        for name, make in parts.items():
            setattr(self, name, make(rngs=rngs))
        self.between = (
            nn.make_norm(
                dims.norm,
                dims.embed_dim,
                eps=dims.norm_eps,
                use_bias=dims.use_bias,
                zero_centered=dims.zero_centered_norm,
                param_dtype=dtype_of(dims.param_dtype),
                rngs=rngs,
            )
            if len(parts) > 1 and not parallel
            else None
        )

    def known_hooks(self) -> tuple[str, ...]:
        """Every `Hook.what`: those of the part, or of both as "<part>.<what>"."""
        found = []
        for name in self.part_names:
            own = getattr(self, name).known_hooks()
            found += own if len(self.part_names) == 1 else [f"{name}.{h}" for h in own]
        return tuple(found)

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, MixerOut]:
        """[B, T, C] -> [B, T, C] in the compute dtype."""
        hooks = self.known_hooks()
        check_request_on_grid(self.own_spec, self.dims, x, ctx, hooks=hooks)
        x = self.enter(x, ctx)
        first, *second = self.part_names
        y, out = getattr(self, first)(x, self._context_of(0, ctx))
        for name in second:
            behind = x if self.between is None else self.between(x.astype(y.dtype) + y)
            more, also = getattr(self, name)(behind, self._context_of(1, ctx))
            y, out = y + more, _both(out, also)
        return y, out

    def enter(self, x: jax.Array, ctx: Context) -> jax.Array:
        """What the parts read of [B, T, C]."""
        del ctx
        return x

    def _context_of(self, index: int, ctx: Context) -> Context:
        """The request to one part: its own hooks, and dropout of its own."""
        if len(self.part_names) == 1:
            return ctx
        name = self.part_names[index]
        hooks = tuple(
            dataclasses.replace(hook, what=hook.what.removeprefix(f"{name}."))
            for hook in ctx.hooks
            if hook.what.startswith(f"{name}.")
        )
        key = ctx.prng_key
        key = None if key is None else jax.random.fold_in(key, index)
        return ctx.replace(hooks=hooks, prng_key=key)

    def init_state(self, batch: int, max_len: int, memory=None):
        """Refused: what a grid holds is seen at once."""
        del batch, max_len, memory
        raise no_decode_form(self.own_spec.name, self.dims)

    def step(self, x: jax.Array, state, ctx: Context):
        """Refused as well."""
        del x, state, ctx
        raise no_decode_form(self.own_spec.name, self.dims)


def no_decode_form(name: str, dims: MixerDims) -> UserError:
    """What `init_state` and `step` raise where there are none."""
    return UserError(
        f"{name}: has no decode form: it sees both ways; got grid={dims.grid}. "
        "Choose another mixer for this layer."
    )


def _both(one: MixerOut, other: MixerOut) -> MixerOut:
    """The reports of two parts: losses add up, metrics are averaged."""
    losses, metrics = dict(one.losses), dict(one.metrics)
    for name, loss in other.losses.items():
        losses[name] = losses[name] + loss if name in losses else loss
    for name, value in other.metrics.items():
        metrics[name] = (metrics[name] + value) / 2 if name in metrics else value
    return MixerOut(losses=losses, metrics=metrics, records=one.records | other.records)


def norm_parameters(dims: MixerDims) -> int:
    """Those of the norm between two parts."""
    return dims.embed_dim * (2 if dims.use_bias and dims.norm == "layer" else 1)
