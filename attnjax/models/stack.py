"""A stack of layers run by one scan per repeated group.

Parameters and buffers live outside the modules as plain dicts of arrays. Group g
of n repeats of a pattern of p layers holds, at "group_<g>"/"sub_<j>", the arrays of
the n layers at place j of the pattern, stacked on a leading axis. Inside the scan
body a layer's arrays are merged with its static graph definition and called.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context, Hook, MixerOut
from attnjax.core.errors import UserError
from attnjax.mixers.slots import blending, probes
from attnjax.models.layout import Layout

# The hook of every layer that is not its mixer's: the residual stream [B, T, C] behind
# the layer.
HIDDEN = "hidden"

POLICIES = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackOut:
    """What the layers return beside the residual stream; a pytree.

    Attributes:
        losses: by name, the mean over the layers that report it.
        metrics: the same of what is reported and not trained.
        records: {layer: {name: array}} of the layers that recorded something.
        buffers: the new buffers, structured like the old ones.
        streams: the extra streams after the last layer.
        carried: what the last layer hands on, [B, T] each.
    """

    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    records: dict[int, dict[str, jax.Array]]
    buffers: dict
    streams: dict[str, jax.Array]
    carried: dict[str, jax.Array]


# (kind, name) -> what each scan over layers reports, [layers].
Scalars = dict[tuple[str, str], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Part:
    """What the layers of one stack return; see `StackOut` and `joined`."""

    scalars: Scalars
    records: dict[int, dict[str, jax.Array]]
    buffers: dict
    streams: dict[str, jax.Array]
    carried: dict[str, jax.Array]


def joined(parts: Sequence[Part]) -> StackOut:
    """What the layers of stacks return that run one behind the other."""
    scalars: Scalars = {}
    records, buffers = {}, {}
    for part in parts:
        for key, values in part.scalars.items():
            scalars.setdefault(key, []).extend(values)
        records |= part.records
        buffers |= part.buffers
    losses, metrics = (_means(scalars, kind) for kind in ("losses", "metrics"))
    last = parts[-1]
    return StackOut(losses, metrics, records, buffers, last.streams, last.carried)


class Stack:
    """Static description of the layers: what to build and how to run it.

    Args:
        layout: which instance stands at which layer, and the groups.
        make_block: (instance name, rngs=) -> a Block.
        remat: "none", "dots" or "full".
        unroll: how many repeats one scan iteration runs; "all" unrolls.
        groups: which of the layout's groups are its own (None: all); hooks and records
            name layers of the whole layout.
    """

    def __init__(
        self,
        layout: Layout,
        make_block: Callable[..., nnx.Module],
        *,
        remat: str = "none",
        unroll: int | str = 1,
        groups: range | None = None,
    ):
        self.layout = layout
        self.groups = range(len(layout.groups)) if groups is None else groups
        self.remat = remat
        self.unroll = unroll
        self._make_block = make_block
        names = {name for g in self.groups for name in layout.groups[g][0]}
        self._graphs = {name: _graph_of(name, make_block) for name in names}

    # ---- parameters

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """Initial (params, buffers); a function of (key, parameter path, layer)."""
        params, buffers = {}, {}
        for g in self.groups:
            group_params, group_buffers = {}, {}
            for j, name in enumerate(self.layout.groups[g][0]):
                layers = jnp.asarray(self.layout.layers_of(g, j), jnp.int32)
                values = jax.vmap(lambda i, n=name: self._init_layer(n, key, i))(layers)
                group_params[f"sub_{j}"], group_buffers[f"sub_{j}"] = values
            params[f"group_{g}"] = group_params
            buffers[f"group_{g}"] = group_buffers
        return params, buffers

    def _init_layer(self, name: str, key: jax.Array, layer) -> tuple[dict, dict]:
        layer_key = jax.random.fold_in(nn.parameter.path_key(key, ("layers",)), layer)
        block = self._make_block(name, rngs=nnx.Rngs(params=layer_key))
        params = nn.materialize(block, key, index=layer)
        return params, nnx.to_pure_dict(nnx.state(block, nn.Buffer))

    # ---- the full pass

    def apply(
        self, params: dict, buffers: dict, x: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """Run every layer on x [B, T, C]; ctx.streams are the raw extra streams
        and ctx.carried the starts of what layers hand on.

        Raises:
            UserError: when a hook names a layer that is not there.
        """
        x, part = self.part(params, buffers, x, ctx)
        return x, joined([part])

    def part(
        self, params: dict, buffers: dict, x: jax.Array, ctx: Context
    ) -> tuple[jax.Array, "Part"]:
        """`apply`, with what several stacks of one layout join."""
        self._check_hooks(ctx)
        carry = (x, dict(ctx.streams), dict(ctx.carried))
        scalars: Scalars = {}
        records: dict[int, dict] = {}
        new_buffers = {}
        for g in self.groups:
            name = f"group_{g}"
            carry, outs = self._group(g, params[name], buffers[name], carry, ctx)
            pieces = []
            for first, count, (part_scalars, part_records, part_buffers) in outs:
                for one in part_scalars.values():
                    for key, value in one.items():
                        scalars.setdefault(key, []).append(value)
                self._collect(g, first, count, part_records, records)
                pieces.append(part_buffers)
            new_buffers[name] = _concatenate(pieces)
        x, streams, carried = carry
        return x, Part(scalars, records, new_buffers, streams, carried)

    def _check_hooks(self, ctx: Context) -> None:
        depth = len(self.layout.names)
        behind = ctx.replace(hooks=_apart(ctx.hooks)[1])
        probes.check_hooks(behind, (HIDDEN,), owner="model", is_step=False)
        for hook in ctx.hooks:
            if any(not 0 <= layer < depth for layer in hook.layers or ()):
                raise UserError(
                    f"hook {hook.name}: layers must be in [0, {depth}); got "
                    f"{list(hook.layers)}."
                )
            if hook.action not in blending.ACTIONS:
                continue
            shape = jnp.shape(ctx.interventions.get(hook.name, 0.0))
            if len(shape) == 2 and shape[0] != depth:
                raise UserError(
                    f"hook {hook.name}: an array of layers and heads needs {depth} "
                    f"rows, one a layer of the model; got shape={shape}."
                )

    def _collect(self, g, first, count, part_records, records) -> None:
        for j, values in part_records.items():
            for i in range(count):
                layer = self.layout.layers_of(g, j)[first + i]
                row = {key: value[i] for key, value in values.items()}
                if row:
                    records[layer] = row

    def _group(self, g: int, params, buffers, carry, ctx: Context):
        """Scan the repeats of group g; repeats with other hooks run apart."""
        pattern, repeats = self.layout.groups[g]
        asked = [
            tuple(
                _hooks_of(ctx.hooks, self.layout.layers_of(g, j)[i])
                for j in range(len(pattern))
            )
            for i in range(repeats)
        ]
        outs = []
        for first, count in _runs(asked):
            layers = {
                f"sub_{j}": jnp.asarray(
                    self.layout.layers_of(g, j)[first : first + count], jnp.int32
                )
                for j in range(len(pattern))
            }
            whole = count == repeats

            def cut(a, first=first, count=count, whole=whole):
                return a if whole else a[first : first + count]

            xs = jax.tree.map(cut, (params, buffers)) + (layers,)
            body = self._body(pattern, ctx, asked[first])
            unroll = count if self.unroll == "all" else min(int(self.unroll), count)
            carry, out = jax.lax.scan(body, carry, xs, unroll=unroll)
            outs.append((first, count, out))
        return carry, outs

    def _body(self, pattern, ctx: Context, hooks: tuple[tuple, ...]):
        def body(carry, xs):
            x, streams, carried = carry
            params, buffers, layers = xs
            scalars, records, new_buffers = {}, {}, {}
            for j, name in enumerate(pattern):
                sub = f"sub_{j}"
                layer = layers[sub]
                prng_key = ctx.prng_key
                if prng_key is not None:
                    prng_key = jax.random.fold_in(prng_key, layer)
                own, after = _apart(hooks[j])
                here = ctx.replace(
                    layer_index=layer, prng_key=prng_key, hooks=own, carried=carried
                )
                block = nnx.merge(self._graphs[name], params[sub], buffers[sub])
                x, streams, out = block(ctx.spread(x), streams, here)
                carried = carried | out.carried
                scalars[j] = _scalars_of(out)
                behind = ctx.replace(hooks=after)
                x = probes.intervene(behind, HIDDEN, x, head_axis=None)
                records[j] = dict(out.records)
                records[j] |= probes.records(behind, HIDDEN, x, head_axis=None)
                new_buffers[sub] = nnx.to_pure_dict(nnx.state(block, nn.Buffer))
            return (ctx.spread(x), streams, carried), (scalars, records, new_buffers)

        if self.remat == "none":
            return body
        return jax.checkpoint(body, prevent_cse=False, policy=POLICIES[self.remat])

    # ---- decoding: an unrolled list of layers, each state donated and replaced

    def unstack(self, params: dict, buffers: dict) -> list[tuple[dict, dict]]:
        """One (params, buffers) a layer, in order: done once before decoding."""
        layers = []
        for g, j, i, _ in self.layout.places:
            pick = lambda a, i=i: a[i]  # noqa: E731
            sub = (params[f"group_{g}"][f"sub_{j}"], buffers[f"group_{g}"][f"sub_{j}"])
            layers.append(jax.tree.map(pick, sub))
        return layers

    def init_state(
        self, layers: list, batch: int, max_len: int, memory=None, streams=()
    ) -> list:
        """The decode state of every layer, for `batch` sequences of `max_len`.

        Args:
            streams: the extra streams' starts by name, [1, max_len, C]. They do not
                depend on the text: they run through the layers here, once, and a mixer
                with `stream_names` is given those that it names.
        """
        states, streams = [], dict(streams)
        ctx = Context(positions=jnp.arange(max_len, dtype=jnp.int32)[None])
        for layer, name in enumerate(self.layout.names):
            block = nnx.merge(self._graphs[name], *layers[layer])
            if not hasattr(block.mixer, "init_state"):
                raise UserError(
                    f"{name}: has no decode form; generation needs one in every layer."
                )
            here = ctx.replace(
                layer_index=jnp.int32(layer), streams=block.normed(streams)
            )
            wanted = getattr(block.mixer, "stream_names", ())
            given = (
                {"streams": {key: here.streams[key] for key in wanted}}
                if wanted
                else {}
            )
            states.append(block.mixer.init_state(batch, max_len, memory, **given))
            streams = block.run_streams(streams, here) if streams else streams
        return states

    def step(
        self, layers: list, states: list, x: jax.Array, ctx: Context
    ) -> tuple[jax.Array, list]:
        """x [B, T, C], the next T >= 1 tokens, and the states -> both."""
        new_states = []
        for layer, name in enumerate(self.layout.names):
            block = nnx.merge(self._graphs[name], *layers[layer])
            here = ctx.replace(layer_index=jnp.int32(layer))
            x, state = block.step(x, states[layer], here)
            new_states.append(state)
        return x, new_states


def _scalars_of(out: MixerOut) -> dict[tuple[str, str], jax.Array]:
    """(kind, name) -> value of what a layer reports."""
    kinds = {"losses": out.losses, "metrics": out.metrics}
    return {(kind, name): v for kind, own in kinds.items() for name, v in own.items()}


def _means(scalars: Scalars, kind: str) -> dict:
    """The mean of each scalar of one kind over all layers that report it."""
    return {
        name: sum(jnp.sum(part) for part in parts) / sum(len(part) for part in parts)
        for (its_kind, name), parts in scalars.items()
        if its_kind == kind
    }


def _graph_of(name: str, make_block) -> Any:
    """The static graph definition of a block, from an abstract build."""
    block = nnx.eval_shape(lambda: make_block(name, rngs=nnx.Rngs(0)))
    try:
        graph, _, _ = nnx.split(block, nnx.Param, nn.Buffer)
    except ValueError as error:
        raise UserError(
            f"{name}: every variable of a mixer must be an nnx.Param or an "
            f"attnjax.nn.Buffer. {error}"
        ) from error
    return graph


def _hooks_of(hooks: tuple[Hook, ...], layer: int) -> tuple[Hook, ...]:
    return tuple(h for h in hooks if h.layers is None or layer in h.layers)


def _apart(hooks: tuple[Hook, ...]) -> tuple[tuple[Hook, ...], tuple[Hook, ...]]:
    """The hooks of a layer's mixer, and those of the residual stream behind it."""
    behind = tuple(hook for hook in hooks if hook.what == HIDDEN)
    return tuple(hook for hook in hooks if hook.what != HIDDEN), behind


def _runs(asked: list[tuple]) -> list[tuple[int, int]]:
    """(first, count) of consecutive repeats that have the same hooks."""
    runs, first = [], 0
    for _, same in itertools.groupby(asked):
        count = len(list(same))
        runs.append((first, count))
        first += count
    return runs


def _concatenate(pieces: list[dict]) -> dict:
    if len(pieces) == 1:
        return pieces[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
