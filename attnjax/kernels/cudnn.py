"""cuDNN's fused attention through `jax.nn`, where it computes exactly the request.

What it would compute otherwise, or without a gradient, is refused by name: a mask
array would be materialised at [B, 1, T, S], a window without the causal flag has
attended to the future, and the bias has a gradient at batch 1 alone. An epilogue is
left to XLA, after it.
"""

from collections.abc import Mapping

import jax

from attnjax.kernels import epilogue
from attnjax.kernels.masks import Causal, Full, SlidingWindow
from attnjax.kernels.request import Request
from attnjax.kernels.scores import Bias
from attnjax.kernels.weight_maps import Softmax

NAME = "cudnn"
RANK = {"gpu": 20}
MAX_HEAD_DIM = 256


def supports(request: Request) -> str | None:
    """Why cuDNN cannot compute the request, or None."""
    checks = (_device, _arrays, _mask, _score, _rest)
    return next((reason for check in checks if (reason := check(request))), None)


def _device(request: Request) -> str | None:
    if request.target.platform != "gpu":
        return f"needs platform gpu, not {request.target.platform}"
    if "NVIDIA" not in request.target.device_kind.upper():
        return f"needs an NVIDIA device, not {request.target.device_kind!r}"
    return None


def _arrays(request: Request) -> str | None:
    if set(request.dtypes) not in ({"bfloat16"}, {"float16"}):
        return f"needs q, k and v all bfloat16 or all float16, not {request.dtypes}"
    if request.head_dim != request.value_dim:
        return f"needs D == E, not D={request.head_dim}, E={request.value_dim}"
    if request.head_dim > MAX_HEAD_DIM or request.head_dim % 8:
        return f"needs D <= {MAX_HEAD_DIM} and a multiple of 8, not {request.head_dim}"
    return None


def _mask(request: Request) -> str | None:
    mask = request.spec.mask
    if not request.static_positions and mask.positional:
        return "has no position operands"
    if "kv_mask" in request.operand_names:
        return "would materialise kv_mask as [B, 1, T, S]"
    if isinstance(mask, Full | Causal):
        return None
    if isinstance(mask, SlidingWindow):
        legal = mask.left is not None and mask.right == 0 and not mask.sinks
        return None if legal else "takes only windows with right=0 and no sinks"
    return f"would materialise {type(mask).__name__} as [B, 1, T, S]"


def _score(request: Request) -> str | None:
    steps = request.spec.score
    if not steps:
        return None
    if len(steps) > 1 or not isinstance(steps[0], Bias):
        names = ", ".join(type(step).__name__ for step in steps)
        return f"computes no score step but one Bias, not {names}"
    if request.batch > 1:
        return f"has a bias gradient at batch 1 alone, not {request.batch}"
    shape = dict(request.operand_shapes)[steps[0].name]
    if shape != (1, request.num_heads, request.q_len, request.kv_len):
        return f"needs a bias of shape [1, H, T, S], not {shape}"
    if request.q_len % 2 or request.kv_len % 2:
        return "needs even T and S with a bias"
    return None


def _rest(request: Request) -> str | None:
    if request.spec.reweight is not None:
        return "makes one pass over the keys; reweight needs two"
    if request.spec.weight_map != Softmax():
        return f"computes plain softmax, not {request.spec.weight_map}"
    if request.spec.return_lse:
        return "returns a log-sum-exp without a gradient"
    return None


def run(
    request: Request,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    operands: Mapping[str, jax.Array],
) -> tuple[jax.Array, None]:
    """Output [B, T, H, D] in q's dtype."""
    mask, steps = request.spec.mask, request.spec.score
    bias = operands[steps[0].name].astype(q.dtype) if steps else None
    window = (mask.left, 0) if isinstance(mask, SlidingWindow) else None
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        scale=request.scale,
        is_causal=not isinstance(mask, Full),
        local_window_size=window,
        implementation="cudnn",
    )
    if request.spec.epilogue:
        steps, wide = request.spec.epilogue, request.compute_dtype
        out = epilogue.run_steps(steps, out.astype(wide), operands).astype(q.dtype)
    return out, None
