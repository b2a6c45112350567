"""The recurrence over tokens shared out along a mesh axis, each device's in order.

What a device's tokens do to a state is affine, S -> A S + C: C is the state after them
from zero, and A is what they leave of the state before them (a decay, or with the delta
rule a matrix). Each device computes its own A and C at once, all get them from all, and
a scan over devices gives each the state before its tokens. Outputs are affine in it
too, o = o_0 + R S: R is the queries, decayed, or with the delta rule what the kernel
gives for values of zero and a state of the identity, D more columns beside the values.
Sent: n states and n A a head. Derivatives are those of these steps.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels.compat import vary_together
from attnjax.kernels.linear.dispatch import PLAIN, settle
from attnjax.kernels.linear.inputs import Inputs, finish, last_document, prepare
from attnjax.kernels.linear.request import LinearRequest, make_request
from attnjax.kernels.linear.spec import LinearSpec
from attnjax.kernels.target import Target, default_target


def linear_attention_of_tokens(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LinearSpec = PLAIN,
    operands: Mapping[str, jax.Array] | None = None,
    *,
    axis_name: str = "sequence",
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.linear_attention` over tokens cut along a mesh axis; call it in
    `shard_map`.

    Args:
        q, k, v, operands: this device's tokens; device i has those before i + 1's.
            `initial_state` and `initial_segment` are what is before the row, the same
            on all devices of the axis.
        spec, implementation, target: as there.
        axis_name: the mesh axis.

    Returns:
        as there, for this device's tokens; the state after the whole row, on all.
    """
    given = {name: jnp.asarray(x) for name, x in (operands or {}).items()}
    request = make_request(q, k, v, spec, given, target or default_target())
    if "segment_ids" in given:
        given["initial_segment"] = _document_before(given, axis_name)
    inputs = prepare(request, q, k, v, given)
    affine = _with_delta if spec.delta else _with_decay
    own, read, (kept, added) = affine(request, inputs, implementation)
    before, last = _before(kept, added, inputs.state, axis_name)
    exact = jax.lax.Precision.HIGHEST if request.dtype != jnp.bfloat16 else None
    far = jnp.einsum("btkgd,bkde->btkge", read, before, precision=exact)
    out = finish(request, own.astype(far.dtype) + far, given)
    return (out, last) if spec.return_state else out


def _document_before(given: Mapping, axis_name: str) -> jax.Array:
    """int [B], the document that this device's first token goes on from."""
    ids = given["segment_ids"]
    first = given.get("initial_segment", jnp.zeros_like(ids[:, 0])).astype(ids.dtype)
    ids, first = vary_together((ids, first))
    found = jax.lax.all_gather(last_document(ids), axis_name)
    index = jax.lax.axis_index(axis_name)
    for device, last in enumerate(found):
        first = jnp.where((device < index) & (last != 0), last, first)
    return first


def _with_decay(request: LinearRequest, inputs: Inputs, implementation: str):
    """(outputs from a state of zero, what reads the state before, (A, C)); without
    the delta rule."""
    zero = inputs._replace(state=jnp.zeros_like(inputs.state))
    own, added = settle(request, implementation).run(request, zero)
    fade = jnp.ones_like(inputs.k[..., :1])
    if inputs.log_decay is not None:
        fade = jnp.exp(jnp.cumsum(inputs.log_decay, axis=1))
    if inputs.reset is not None:
        same = jnp.cumsum(inputs.reset, axis=1) == 0
        fade = jnp.where(same[..., None, None], fade, 0)
    return own, inputs.q * fade[:, :, :, None], (fade[:, -1][..., None], added)


def _with_delta(request: LinearRequest, inputs: Inputs, implementation: str):
    """The same with the delta rule."""
    dim, value_dim = request.dim, request.value_dim
    wide = dataclasses.replace(request, value_dim=value_dim + dim)
    identity = jnp.broadcast_to(
        jnp.eye(dim, dtype=inputs.state.dtype), (*inputs.state.shape[:3], dim)
    )
    state = jnp.concatenate([jnp.zeros_like(inputs.state), identity], axis=-1)
    v = jnp.concatenate([inputs.v, jnp.zeros_like(inputs.k)], axis=-1)
    given = vary_together(inputs._replace(v=v, state=state))
    found = settle(wide, implementation).run(wide, given)
    (own, read), (added, kept) = (
        jnp.split(x, [value_dim], axis=-1) for x in (found[0], found[1])
    )
    return own, read, (kept, added)


def _before(kept, added, state, axis_name: str):
    """The states before this device's tokens, and after all tokens.

    Args:
        kept: A, [B, K, D, D], or [B, K, D or 1, 1] to multiply by.
        added: C, [B, K, D, E].
        state: before the row.
    """
    devices = jax.lax.all_gather((kept, added), axis_name)
    highest = jax.lax.Precision.HIGHEST

    def step(state, device):
        kept, added = device
        if kept.shape[-1] > 1:
            return jnp.matmul(kept, state, precision=highest) + added, state
        return kept * state + added, state

    last, before = jax.lax.scan(step, state, devices)
    index = jax.lax.axis_index(axis_name)
    is_last = index == jax.lax.axis_size(axis_name) - 1
    # Equal on all devices; a sum over them says so.
    last = jax.lax.psum(jnp.where(is_last, last, 0), axis_name)
    return jax.lax.dynamic_index_in_dim(before, index, keepdims=False), last
