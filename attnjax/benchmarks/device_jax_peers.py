"""Attention of other JAX libraries, called as our own implementations are.

`CUDNN_MASK` is cuDNN given as an array the mask that it has no flag for; `TOKAMAX` is
tokamax's Mosaic GPU attention, with its block sizes tuned before it is timed.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp

from attnjax import kernels
from attnjax.kernels import cudnn, tiles
from attnjax.kernels.request import Request

# The mask as an array, beside the operands of a spec.
DENSE = "dense_mask"


def dense_mask(request: Request, operands) -> jax.Array:
    """bool [1 or B, 1 or H, T, S]: True where a query sees a key."""
    placed = tiles.place_queries(tiles.of_tiles(request.spec, operands), request.q_len)
    area = (0, request.q_len, 0, request.kv_len)
    seen = tiles.visible(request.spec, tiles.make_tile(request, placed, area))
    return jnp.broadcast_to(seen, (*seen.shape[:2], request.q_len, request.kv_len))


class CuDNNMask:
    """cuDNN through `jax.nn`, given the mask; its making is not timed."""

    NAME = "cudnn_mask"

    def supports(self, request: Request) -> str | None:
        """Why it cannot compute the request, or None."""
        spec = request.spec
        if isinstance(spec.mask, kernels.Full | kernels.Causal):
            return "is for masks without a flag; cudnn has one"
        if spec.score:
            return "is for plain scores here"
        bare = dataclasses.replace(spec, mask=kernels.Full())
        return cudnn.supports(dataclasses.replace(request, spec=bare))

    def prepare(self, request: Request, operands) -> dict[str, jax.Array]:
        """The mask."""
        return {DENSE: jax.jit(dense_mask, static_argnums=0)(request, operands)}

    def run(self, request: Request, q, k, v, operands) -> tuple[jax.Array, None]:
        """Output [B, T, H, D]."""
        given = {"scale": request.scale, "implementation": "cudnn"}
        out = jax.nn.dot_product_attention(q, k, v, mask=operands[DENSE], **given)
        return out, None


class Tokamax:
    """`tokamax.dot_product_attention`, forward and backward on Mosaic GPU.

    Source: the README and docstrings of github.com/openxla/tokamax, 0.0.13.
    """

    NAME = "tokamax"

    def supports(self, request: Request) -> str | None:
        """Why it cannot compute the request, or None."""
        spec = request.spec
        if request.target.platform != "gpu":
            return f"needs platform gpu, not {request.target.platform}"
        if spec.weight_map != kernels.Softmax() or spec.reweight or spec.epilogue:
            return "computes plain softmax, without an epilogue"
        if spec.return_lse:
            return "returns no log-sum"
        if not request.static_positions or "kv_mask" in request.operand_names:
            return "has no position operands"
        steps = spec.score
        if len(steps) > 1 or not all(
            isinstance(x, kernels.SoftCap | kernels.Bias) for x in steps
        ):
            return "has one SoftCap or one Bias alone"
        try:
            importlib.import_module("tokamax")
        except Exception as error:  # of its own imports too
            return f"cannot be imported ({error}); pip install tokamax".replace(
                "\n", " "
            )
        return None

    def prepare(self, request: Request, operands) -> dict[str, jax.Array]:
        """The mask, where there is no flag for it."""
        if _flags(request.spec.mask) is not None:
            return {}
        return {DENSE: jax.jit(dense_mask, static_argnums=0)(request, operands)}

    def run(self, request: Request, q, k, v, operands) -> tuple[jax.Array, None]:
        """Output [B, T, H, E]."""
        tokamax = importlib.import_module("tokamax")
        step = request.spec.score[0] if request.spec.score else None
        bias = operands[step.name] if isinstance(step, kernels.Bias) else None
        cap = step.cap if isinstance(step, kernels.SoftCap) else None
        flags = _flags(request.spec.mask)
        out = tokamax.dot_product_attention(
            q,
            k,
            v,
            bias,
            operands[DENSE] if flags is None else None,
            scale=request.scale,
            logits_soft_cap=cap,
            implementation="mosaic",
            **(flags or {}),
        )
        return out, None

    def tuned(self, program, arguments):
        """A context in which its calls have the block sizes that were fastest."""
        return importlib.import_module("tokamax").autotune(program, *arguments)


def _flags(mask: kernels.Mask) -> dict | None:
    """A mask in flags, or None."""
    if isinstance(mask, kernels.Full):
        return {}
    if isinstance(mask, kernels.Causal):
        return {"is_causal": True}
    window = isinstance(mask, kernels.SlidingWindow)
    if window and mask.left is not None and mask.right == 0 and not mask.sinks:
        return {"is_causal": True, "local_window_size": (mask.left, 0)}
    return None


CUDNN_MASK, TOKAMAX = CuDNNMask(), Tokamax()
