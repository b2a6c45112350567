"""`linear_attention`: the entry point of the family, and the choice of its form.

An implementation is a module with NAME, RANK and supports(request) as for
`attention`, and run(request, inputs) -> (outputs [B, T, K, G, E], last state) of the
bare recurrence (inputs.py).
"""

from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp

from attnjax.kernels import choices
from attnjax.kernels.errors import nearest
from attnjax.kernels.linear import blocked, mosaic_gpu, mosaic_tpu, reference
from attnjax.kernels.linear.inputs import finish, prepare
from attnjax.kernels.linear.request import (
    OWNER,
    LinearRequest,
    make_request,
    state_shape,
)
from attnjax.kernels.linear.spec import LinearSpec
from attnjax.kernels.target import Target, default_target

LINEAR_IMPLEMENTATIONS: tuple[ModuleType, ...] = (
    reference,
    blocked,
    mosaic_gpu,
    mosaic_tpu,
)
PLAIN = LinearSpec()


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LinearSpec = PLAIN,
    operands: Mapping[str, jax.Array] | None = None,
    *,
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The recurrence of `spec` over the tokens of q, k and v; causal.

    Args:
        q: [B, T, H, D], after its feature map.
        k: [B, T, K, D], after its feature map; H is a multiple of K, and query head
            h reads the state of head h // (H / K).
        v: [B, T, K, E].
        spec: the computation; static, so mark it so under `jax.jit`.
        operands: arrays by name. `log_decay` (at most 0, finite) and `beta` as the
            spec says. Every spec also takes `segment_ids` int [B, T]: a new id starts
            from a zero state, 0 is padding, which leaves the state alone and has
            output 0; `initial_state` [B, K, D, E] (with a normaliser [B, K, D,
            E + 1], z in the last column); and, with segment_ids, `initial_segment`
            int [B], the document that the initial state is of (left out or 0: the
            first document of the row).
        implementation: "auto", or a name among `LINEAR_IMPLEMENTATIONS`.
        target: the device that the call is compiled for; None means the default
            backend.

    Returns:
        [B, T, H, E] in q's dtype; with `spec.return_state` also the state after the
        last token, shaped like `initial_state`, in float32 (float64 for float64
        inputs), in which all sums are made.

    Raises:
        ValueError: wrong shapes, operands or implementation name.
        TypeError: wrong dtypes or types.

    Cost: chunks of L: time O(T (L + D) (D + E)) a head; the backward pass keeps its
        inputs and makes one state a chunk.
    """
    operands = {name: jnp.asarray(x) for name, x in (operands or {}).items()}
    request = make_request(q, k, v, spec, operands, target or default_target())
    module = settle(request, implementation)
    out, state = module.run(request, prepare(request, q, k, v, operands))
    out = finish(request, out, operands)
    return (out, state) if spec.return_state else out


def settle(request: LinearRequest, implementation: str) -> ModuleType:
    """The implementation that a call runs, told to whoever is `watching`."""
    module = choose(request, implementation)
    watch = choices.current()
    if watch is not None:
        module = watch.settle(request, module, _candidates(request))
    return module


def linear_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array,
    spec: LinearSpec = PLAIN,
    operands: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token after those that `state` sums up: the form for decoding.

    Args:
        q: [B, 1, H, D].
        k: [B, 1, K, D].
        v: [B, 1, K, E].
        state: [B, K, D, E] (E + 1 with a normaliser).
        spec, operands: as in `linear_attention`, without initial_state.

    Returns:
        [B, 1, H, E] in q's dtype, and the next state.

    Raises:
        ValueError, TypeError: as `linear_attention`, or when T is not 1.
    """
    if q.ndim == 4 and q.shape[1] != 1:
        raise ValueError(
            f"linear_attention_step: T must be 1; got T={q.shape[1]}. Use "
            "linear_attention with the operand initial_state for more tokens."
        )
    operands = {name: jnp.asarray(x) for name, x in (operands or {}).items()}
    operands["initial_state"] = state
    request = make_request(q, k, v, spec, operands, default_target())
    inputs = prepare(request, q, k, v, operands)
    token = jax.tree.map(lambda x: x[:, 0], inputs._replace(state=None))
    state, out = reference.step(inputs.state, token)
    return finish(request, out[:, None], operands), state


def empty_linear_state(
    spec: LinearSpec,
    *,
    batch: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    dtype=jnp.float32,
) -> jax.Array:
    """The state before the first token: zeros [B, K, D, E] (E + 1 with normaliser)."""
    return jnp.zeros(state_shape(spec, batch, kv_heads, dim, value_dim), dtype)


def choose(request: LinearRequest, implementation: str = "auto") -> ModuleType:
    """The implementation that `linear_attention` runs.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: when the named one does not support the request.
    """
    by_name = {module.NAME: module for module in LINEAR_IMPLEMENTATIONS}
    if implementation == "auto":
        able = [m for m in _candidates(request) if m.supports(request) is None]
        # `blocked` supports everything everywhere, so there always is one.
        return able[0]
    if implementation not in by_name:
        raise ValueError(
            f"{OWNER}: unknown implementation {implementation!r}. "
            f"{nearest(implementation, ['auto', *by_name])}"
        )
    reason = by_name[implementation].supports(request)
    if reason is not None:
        raise NotImplementedError(
            f"{OWNER}: implementation={implementation!r} {reason}. "
            "Use implementation='auto'."
        )
    return by_name[implementation]


def _candidates(request: LinearRequest) -> list[ModuleType]:
    """Implementations that "auto" considers, best first."""
    platform = request.target.platform
    able = [module for module in LINEAR_IMPLEMENTATIONS if platform in module.RANK]
    return sorted(able, key=lambda module: -module.RANK[platform])


def explain_linear(
    q,
    k,
    v,
    spec: LinearSpec = PLAIN,
    operands: Mapping[str, jax.Array] | None = None,
    *,
    target: Target | None = None,
) -> list[str]:
    """Which implementation "auto" takes, and why not the others.

    Takes arrays or `jax.ShapeDtypeStruct`s; computes nothing.

    Returns:
        first line "uses NAME on PLATFORM", then one line "NAME: reason" each.
    """
    request = make_request(q, k, v, spec, operands or {}, target or default_target())
    first = f"uses {choose(request).NAME} on {request.target.platform}"
    return [first, *reasons(request)]


def reasons(request: LinearRequest) -> list[str]:
    """One line for each implementation: whether and why it can take the request."""
    lines = []
    for module in LINEAR_IMPLEMENTATIONS:
        reason = module.supports(request)
        if reason is None and request.target.platform not in module.RANK:
            reason = "supports it, but only when asked for by name"
            reason += getattr(module, "WHY_BY_NAME", "")
        lines.append(f"{module.NAME}: {reason or 'supports it'}")
    return lines
