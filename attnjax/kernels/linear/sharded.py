"""The recurrence on arrays cut over a mesh: one `shard_map`, its cuts declared.

Rows and key/value heads have states of their own, so each device computes its own
without a message. Where tokens are shared out, states are exchanged (tokens.py).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attnjax.kernels.linear.dispatch import PLAIN, linear_attention
from attnjax.kernels.linear.spec import LinearSpec
from attnjax.kernels.linear.tokens import linear_attention_of_tokens
from attnjax.kernels.sharded import DEFAULT, Cuts
from attnjax.kernels.target import Target

# The axes of each operand: b rows, t tokens, k heads of keys and values.
LETTERS = {
    "beta": "btk",
    "segment_ids": "bt",
    "initial_state": "bkde",
    "initial_segment": "b",
}
LETTERS_OF_DECAY = {"head": "k", "token": "btk", "channel": "btkd"}


def sharded_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LinearSpec = PLAIN,
    operands: Mapping[str, jax.Array] | None = None,
    *,
    mesh: Mesh,
    cuts: Cuts = DEFAULT,
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.linear_attention` of whole arrays, each device computing its part.

    Args:
        q, k, v, spec, operands, implementation, target: as there.
        mesh: the devices.
        cuts: which mesh axes share rows, heads and tokens, which lie in order.

    Raises:
        ValueError: sizes that the mesh cannot share out.
    """
    cuts = cuts.on(mesh)
    given = {name: jnp.asarray(x) for name, x in (operands or {}).items()}
    _check_sizes(cuts, mesh, q.shape, k.shape)
    letters = LETTERS | {"log_decay": LETTERS_OF_DECAY.get(spec.decay, "")}
    specs = {n: cuts.spec(letters.get(n, ""), x.shape) for n, x in given.items()}
    heads = P(cuts.batch or None, cuts.sequence, cuts.heads)
    state = P(cuts.batch or None, cuts.heads)
    form = linear_attention
    if cuts.sequence is not None:
        form = functools.partial(linear_attention_of_tokens, axis_name=cuts.sequence)
    run = functools.partial(form, implementation=implementation, target=target)
    body = jax.shard_map(
        lambda q, k, v, operands: run(q, k, v, spec, operands),
        mesh=mesh,
        in_specs=(heads, heads, heads, specs),
        out_specs=(heads, state) if spec.return_state else heads,
    )
    return jax.jit(body)(q, k, v, given)


def _check_sizes(cuts: Cuts, mesh: Mesh, q_shape, k_shape) -> None:
    sizes, batch = dict(mesh.shape), 1
    for name in cuts.batch:
        batch *= sizes[name]
    heads, tokens = sizes.get(cuts.heads, 1), sizes.get(cuts.sequence, 1)
    pairs = (("B", q_shape[0], batch), ("T", q_shape[1], tokens))
    pairs += (("H", q_shape[2], heads),)
    for name, size, parts in (*pairs, ("K", k_shape[2], heads)):
        if size % parts:
            raise ValueError(
                f"sharded_linear_attention: {name} must be a multiple of the {parts} "
                f"devices that share it; got {name}={size}."
            )
