"""Attention over tokens that are shared out along a mesh axis: the ring.

Keys and values go round the devices; each device joins the parts by their log-sums (by
addition for maps without a sum), so a device never holds more than two shards of keys
(Liu et al., arXiv 2310.01889). The backward pass sends keys round again, with their
gradients beside them, and computes each part's weights again.

Under a causal mask the last of n devices would have n times the work of the first if
tokens lay in order; in the order `zigzag` each device has an early and a late piece,
which is balanced. Positions tell masks where tokens are.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels import dispatch, epilogue, tiles
from attnjax.kernels.compat import vary_together
from attnjax.kernels.low_rank import widen, widened
from attnjax.kernels.merge import merge
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.target import Target, default_target

Arrays = Mapping[str, jax.Array]


def zigzag(length: int, devices: int) -> np.ndarray:
    """The order of tokens that balances causal work: device i of n holds piece i and
    piece 2 n - 1 - i of 2 n pieces. int [length], positions in the order in which
    tokens should lie; `np.argsort` of it undoes it.

    Raises:
        ValueError: when 2 n does not divide the length.
    """
    if length % (2 * devices):
        raise ValueError(
            "zigzag: length must be a multiple of 2 * devices; got "
            f"length={length}, devices={devices}."
        )
    pieces = np.arange(length).reshape(2 * devices, -1)
    order = [piece for i in range(devices) for piece in (i, 2 * devices - 1 - i)]
    return pieces[order].reshape(-1)


def ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    operands: Arrays | None = None,
    *,
    axis_name: str = "sequence",
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.attention` over tokens cut along a mesh axis; call it in `shard_map`.

    Args:
        q, k, v: this device's tokens, [B, T, H, D], [B, S, K, D], [B, S, K, E].
        spec: without `reweight`, whose rows do not merge.
        operands: with a t axis, or an s axis and no t axis: this device's tokens;
            with both: this device's queries and every key. `q_positions` and
            `k_positions` say where the tokens are; without them device i holds the
            positions from i T (plus `q_offset`) and i S.
        axis_name: the mesh axis.
        implementation, target: of each part, as in `attention`.

    Returns:
        this device's rows, as `attention`.

    Raises:
        NotImplementedError: for `reweight`.
    """
    if spec.reweight is not None:
        raise NotImplementedError(
            "ring: results over parts of the keys cannot be merged once rows are "
            f"reweighted; got reweight={spec.reweight}. Use all_to_all."
        )
    target, dtype = target or default_target(), q.dtype
    given = {name: jnp.asarray(x) for name, x in (operands or {}).items()}
    if widened(spec):
        q, k, spec, given = widen(q, k, spec, given, target)
    q, k, v, given = vary_together((q, k, v, given))
    core = _core(spec)
    inner = _placed(given, q.shape[1], k.shape[1], axis_name)
    inner = {n: x for n, x in inner.items() if n in tiles.declarations(core)}
    q, inner = vary_together((q, inner))
    plan = _plan(core, inner, axis_name, implementation, target)
    trained = {name: x for name, x in inner.items() if plan.known[name].trains}
    fixed = {name: x for name, x in inner.items() if name not in trained}
    part = _rotate(plan, q, k, v, trained, fixed)
    out, lse = merge([part], weight_map=spec.weight_map, operands=given)
    out = epilogue.run_steps(spec.epilogue, out, given).astype(dtype)
    return (out, lse) if spec.return_lse else out


def _placed(operands: Arrays, q_len: int, kv_len: int, axis_name: str) -> dict:
    """Operands with the positions of this device's tokens."""
    operands, index = dict(operands), jax.lax.axis_index(axis_name)
    for name, size in (("q_positions", q_len), ("k_positions", kv_len)):
        if name not in operands:
            steps = jnp.arange(size, dtype=jnp.int32) + index * size
            operands[name] = steps[None]
    if "q_offset" in operands:
        offset = jnp.reshape(operands.pop("q_offset"), (-1, 1)).astype(jnp.int32)
        operands["q_positions"] = operands["q_positions"] + offset
    return operands


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one ring.

    Attributes:
        core: the spec of a part: no sink, no epilogue, log-sums if it has a sum.
        axis_name, size: the mesh axis and its devices.
        travels: operands that go round with the keys.
        columns: operands of every key, cut to the part's.
        implementation, target: of each part.
    """

    core: AttentionSpec
    axis_name: str
    size: int
    travels: frozenset[str]
    columns: frozenset[str]
    implementation: str
    target: Target

    @functools.cached_property
    def known(self):
        """Declarations of operands by name."""
        return tiles.declarations(self.core)

    def send(self, tree):
        """Each device's arrays to the next one."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, ring), tree)

    def owner(self, step) -> jax.Array:
        """Whose keys are here after so many steps."""
        return (jax.lax.axis_index(self.axis_name) - step) % self.size

    def cut(self, operands: Arrays, owner, kv_len: int) -> dict:
        """Operands of a part: columns cut to the keys that are here."""
        return {
            name: jax.lax.dynamic_slice_in_dim(x, owner * kv_len, kv_len, 3)
            if name in self.columns
            else x
            for name, x in operands.items()
        }

    def attend(self, q, k, v, operands: Arrays):
        """One part: output and log-sum (0 for a map without a sum)."""
        got = dispatch.attention(
            q,
            k,
            v,
            self.core,
            operands,
            implementation=self.implementation,
            target=self.target,
        )
        if self.core.return_lse:
            return got
        return got, vary_together((q, jnp.zeros(q.shape[:3], jnp.float32)))[1]


def _core(spec: AttentionSpec) -> AttentionSpec:
    """The spec of one part."""
    bare = spec.weight_map.bare()
    return dataclasses.replace(
        spec, weight_map=bare, epilogue=(), return_lse=bare.needs_sum
    )


def _plan(
    core: AttentionSpec, operands: Arrays, axis_name: str, implementation, target
) -> _Plan:
    axes = {name: tiles.declarations(core)[name].axes for name in operands}
    travels = {
        n for n, letters in axes.items() if "s" in letters and "t" not in letters
    }
    travels = {n for n in travels if operands[n].shape[axes[n].index("s")] > 1}
    columns = {n for n, letters in axes.items() if "s" in letters and "t" in letters}
    columns = {n for n in columns if operands[n].shape[3] > 1}
    return _Plan(
        core=core,
        axis_name=axis_name,
        size=jax.lax.axis_size(axis_name),
        travels=frozenset(travels),
        columns=frozenset(columns),
        implementation=implementation,
        target=target,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(plan: _Plan, q, k, v, trained: Arrays, fixed: Arrays):
    """Output in float32 (float64) and log-sum (None) over every device's keys."""
    return _rotate_fwd(plan, q, k, v, trained, fixed)[0]


def _rotate_fwd(plan: _Plan, q, k, v, trained: Arrays, fixed: Arrays):
    operands = {**trained, **fixed}
    stays = {n: x for n, x in operands.items() if n not in plan.travels}
    wide = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    weight_map, summed = plan.core.weight_map, plan.core.weight_map.needs_sum

    def step(carry, i):
        (k, v, travels), total = carry
        sent = plan.send((k, v, travels))
        cut = plan.cut(stays, plan.owner(i), k.shape[1])
        out, lse = plan.attend(q, k, v, cut | travels)
        parts = [total, (out.astype(wide), lse)]
        out, lse = merge(parts, weight_map=weight_map)
        return (sent, (out, lse if summed else total[1])), None

    start = {n: operands[n] for n in plan.travels}
    shape = (*q.shape[:3], v.shape[3])
    total = jnp.zeros(shape, wide), jnp.full(q.shape[:3], -jnp.inf, wide)
    _, *total = vary_together((q, *total))
    steps = jnp.arange(plan.size, dtype=jnp.int32)
    (_, (out, lse)), _ = jax.lax.scan(step, ((k, v, start), tuple(total)), steps)
    result = out, lse if summed else None
    return result, (q, k, v, trained, fixed, result)


def _rotate_bwd(plan: _Plan, kept, cotangents):
    q, k, v, trained, fixed, (out, lse) = kept
    d_out, d_lse = cotangents
    wide = out.dtype
    summed = lse is not None
    travels = {n: x for n, x in {**trained, **fixed}.items() if n in plan.travels}
    stays = {n: x for n, x in trained.items() if n not in plan.travels}
    rest = {n: x for n, x in fixed.items() if n not in plan.travels}
    if summed:
        d_sum = d_lse - jnp.sum(d_out * out, axis=-1)
        finite = jnp.where(lse == -jnp.inf, 0, lse)

    def step(carry, i):
        (k, v, travels), (d_k, d_v, d_travels), (d_q, d_stays) = carry
        owner = plan.owner(i)
        here = plan.cut(rest, owner, k.shape[1])
        moving = {n: travels[n] for n in d_travels}
        still = {n: x for n, x in travels.items() if n not in d_travels}

        def part(q, k, v, moving, stays):
            cut = plan.cut(stays, owner, k.shape[1])
            return plan.attend(q, k, v, here | still | moving | cut)

        (out_i, lse_i), pull = jax.vjp(part, q, k, v, moving, stays)
        d_out_i, d_lse_i = d_out, jnp.zeros_like(lse_i)
        if summed:
            share = jnp.exp(lse_i - finite)
            d_out_i = d_out * share[..., None]
            own = jnp.sum(d_out * out_i.astype(wide), axis=-1)
            d_lse_i = share * (own + d_sum)
        ct = d_out_i.astype(out_i.dtype), d_lse_i.astype(lse_i.dtype)
        parts = jax.tree.map(lambda x: x.astype(wide), pull(ct))
        add = functools.partial(jax.tree.map, jnp.add)
        d_q, d_stays = d_q + parts[0], add(d_stays, parts[4])
        moved = add((d_k, d_v, d_travels), parts[1:4])
        sent = plan.send(((k, v, travels), moved))
        return (*sent, (d_q, d_stays)), None

    def zeros(tree):
        return jax.tree.map(
            lambda x: vary_together((q, jnp.zeros(x.shape, wide)))[1], tree
        )

    moving = {n: x for n, x in travels.items() if n in trained}
    start = ((k, v, travels), zeros((k, v, moving)), zeros((q, stays)))
    steps = jnp.arange(plan.size, dtype=jnp.int32)
    (_, (d_k, d_v, d_moving), (d_q, d_stays)), _ = jax.lax.scan(step, start, steps)
    d_trained = {n: (d_moving | d_stays)[n].astype(x.dtype) for n, x in trained.items()}
    return (
        d_q.astype(q.dtype),
        d_k.astype(k.dtype),
        d_v.astype(v.dtype),
        d_trained,
        None,
    )


_rotate.defvjp(_rotate_fwd, _rotate_bwd)
