"""FlexAttention of PyTorch beside our kernels: the same variants, in its own words.

A spec becomes `score_mod` and `mask_mod`; the mask's list of blocks is made before
anything is timed, while ours are sorted within the time. Arrays lie as it likes them
best, [B, H, T, D]. Documentation: docs.pytorch.org, torch.nn.attention.flex_attention.
"""

from collections.abc import Callable
from typing import Any

from attnjax import kernels
from attnjax.benchmarks import device_cases, device_torch
from attnjax.benchmarks.device_torch import Place, TorchPrograms
from attnjax.kernels.masks import And, Or

try:
    import torch
    from torch.nn.attention.flex_attention import (
        AuxRequest,
        create_block_mask,
        flex_attention,
    )
except ImportError as error:
    flex_attention = None
    REASON = f"needs PyTorch 2.9 or later ({error})"

# (b, h, q, k) -> bool, of index tensors.
MaskMod = Callable[[Any, Any, Any, Any], Any]
# (score, b, h, q, k) -> score.
ScoreMod = Callable[[Any, Any, Any, Any, Any], Any]


def _window(mask, _) -> MaskMod:
    def visible(b, h, q, k):
        seen = k <= q + mask.right if mask.right is not None else k >= 0
        if mask.left is not None:
            near = k >= q - mask.left
            seen = seen & ((near | (k < mask.sinks)) if mask.sinks else near)
        return seen

    return visible


def _prefix(_, x) -> MaskMod:
    lengths = x["prefix_len"]
    return lambda b, h, q, k: k < lengths[b]


def _segments(mask, x) -> MaskMod:
    own, other = x["q_segment_ids"], x["k_segment_ids"]
    return lambda b, h, q, k: (own[b, q] == other[b, k]) & (own[b, q] != 0)


def _blocks(mask, x) -> MaskMod:
    marks = x["block_mask"]
    rows, columns = mask.block_q, mask.block_k

    def visible(b, h, q, k):
        return marks[_at(marks, 0, b), _at(marks, 1, h), q // rows, k // columns]

    return visible


def _both(mask, x) -> MaskMod:
    first, second = mask_mod(mask.first, x), mask_mod(mask.second, x)
    return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)


def _either(mask, x) -> MaskMod:
    first, second = mask_mod(mask.first, x), mask_mod(mask.second, x)
    return lambda b, h, q, k: first(b, h, q, k) | second(b, h, q, k)


# How each mask is said to FlexAttention: (mask, operands) -> mask_mod.
MASKS: dict[type, Callable[[Any, Any], MaskMod]] = {
    kernels.Causal: lambda mask, x: lambda b, h, q, k: k <= q,
    kernels.SlidingWindow: _window,
    kernels.Prefix: _prefix,
    kernels.Segments: _segments,
    kernels.BlockMask: _blocks,
    And: _both,
    Or: _either,
}


def _soft_cap(step, _) -> ScoreMod:
    return lambda s, b, h, q, k: step.cap * torch.tanh(s / step.cap)


def _alibi(_, x) -> ScoreMod:
    slopes = x["alibi_slopes"]
    return lambda s, b, h, q, k: s - slopes[h] * (q - k).abs()


def _bias(step, x) -> ScoreMod:
    bias = x[step.name]
    return lambda s, b, h, q, k: s + bias[_at(bias, 0, b), _at(bias, 1, h), q, k]


def _distances(step, x) -> ScoreMod:
    table, reach = x[step.name], step.reach

    def moved(s, b, h, q, k):
        return s + table[_at(table, 0, h), (q - k).clamp(-reach, reach) + reach]

    return moved


def _function(step, x) -> ScoreMod:
    return FUNCTIONS[step.fn](*(x[name] for name in step.names))


def _far_penalty(strength) -> ScoreMod:
    return lambda s, b, h, q, k: s - strength[h] * torch.log((q - k).abs() + 1.0)


# How each step is said to it: (step, operands) -> score_mod.
SCORES: dict[type, Callable[[Any, Any], ScoreMod]] = {
    kernels.SoftCap: _soft_cap,
    kernels.ALiBi: _alibi,
    kernels.Bias: _bias,
    kernels.RelativeBias: _distances,
    kernels.ScoreFn: _function,
}
# Functions of scores in PyTorch, each beside ours: (operands) -> score_mod.
FUNCTIONS = {device_cases.far_penalty: _far_penalty}


def _at(array, axis: int, index):
    """The index, or 0 in an axis that is shared."""
    return index if array.shape[axis] > 1 else 0


def mask_mod(mask: kernels.Mask, operands) -> MaskMod:
    """A mask as FlexAttention takes it, with `q_offset` added to the queries."""
    bare = MASKS[type(mask)](mask, operands)
    offset = operands.get("q_offset")
    if offset is None or isinstance(mask, And | Or) or not mask.positional:
        return bare
    return lambda b, h, q, k: bare(b, h, q + offset, k)


def score_mod(steps, operands) -> ScoreMod | None:
    """Score steps as FlexAttention takes them."""
    mods = [SCORES[type(step)](step, operands) for step in steps]
    if len(mods) < 2:
        return mods[0] if mods else None

    def chain(s, b, h, q, k):
        for mod in mods:
            s = mod(s, b, h, q, k)
        return s

    return chain


def refusal(spec: kernels.AttentionSpec) -> str | None:
    """Why FlexAttention cannot compute a spec, or None."""
    if not isinstance(spec.weight_map, kernels.Softmax):
        return f"has softmax weights alone, not {type(spec.weight_map).__name__}"
    if spec.reweight is not None:
        return "makes one pass over the keys; reweight needs two"
    if spec.epilogue:
        return "has no epilogue"
    unknown = [x for x in _masks(spec.mask) if type(x) not in MASKS]
    unknown += [x for x in spec.score if type(x) not in SCORES]
    unknown += [
        x.fn
        for x in spec.score
        if isinstance(x, kernels.ScoreFn) and x.fn not in FUNCTIONS
    ]
    return f"is not written here for {unknown[0]}" if unknown else None


def _masks(mask: kernels.Mask) -> list[kernels.Mask]:
    if isinstance(mask, And | Or):
        return [*_masks(mask.first), *_masks(mask.second)]
    return [] if isinstance(mask, kernels.Full) else [mask]


def attention(spec: kernels.AttentionSpec, tensors, place: Place):
    """(q, k, v, operands) -> (output [B, H, T, E], log-sum [B, H, T] or None).

    Args:
        tensors: q, k, v [B, H, T, D] and what the mask reads.
    """
    q, k, lists = tensors["q"], tensors["k"], None
    if not isinstance(spec.mask, kernels.Full):
        lists = _lists(spec.mask, tensors, place)
    scale, grouped = spec.scale, q.shape[1] != k.shape[1]
    sink = spec.weight_map.sink
    with_sums = spec.return_lse or sink is not None

    def attend(q, k, v, mod, logit):
        found = flex_attention(
            q,
            k,
            v,
            score_mod=mod,
            block_mask=lists,
            scale=scale,
            enable_gqa=grouped,
            return_aux=AuxRequest(lse=True) if with_sums else None,
        )
        if not with_sums:
            return found, None
        out, lse = found[0], found[1].lse
        if logit is None:
            return out, lse
        # exp(lse) / (exp(lse) + exp(logit)): a sink has a weight and no value.
        kept = torch.sigmoid(lse - logit)[..., None]
        return (out * kept).to(out.dtype), torch.logaddexp(lse, 0 * lse + logit)

    run_it = device_torch.compiled(attend, place)

    def call(q, k, v, operands):
        logit = operands["sink"][:, None] if sink == "logit" else None
        logit = 0.0 if sink == "off_by_one" else logit
        return run_it(q, k, v, score_mod(spec.score, operands), logit)

    return call


def _lists(mask: kernels.Mask, tensors, place: Place):
    """FlexAttention's lists of blocks, for all rows and heads at once if they agree."""
    q, k = tensors["q"], tensors["k"]
    axes = "".join(x.axes for x in mask.operands)
    marks = tensors.get("block_mask")
    per_head = marks is not None and marks.shape[1] > 1
    return create_block_mask(
        mask_mod(mask, tensors),
        q.shape[0] if "b" in axes or "*" in axes else None,
        q.shape[1] if per_head else None,
        q.shape[2],
        k.shape[2],
        device=place.device,
    )


def _bring(qkv, operands, place: Place):
    tensors = {n: _heads_first(x, place) for n, x in zip("qkv", qkv, strict=True)}
    return tensors | {n: device_torch.to_torch(x, place) for n, x in operands.items()}


def _heads_first(x, place: Place):
    return device_torch.to_torch(x, place).transpose(1, 2).contiguous()


def programs(variant, given, place: Place):
    """(programs, None), or (None, why it cannot)."""
    reason = _missing(variant, place)
    if reason is not None:
        return None, reason
    qkv, operands, cotangents = given
    spec, tensors = variant.spec, _bring(qkv, operands, place)
    run_it = attention(spec, tensors, place)

    def attend(x, _):
        out, lse = run_it(x["q"], x["k"], x["v"], x)
        return {"out": out, "lse": lse} if spec.return_lse else {"out": out}

    floats = tuple(n for n, x in tensors.items() if x.is_floating_point())
    both = dict(zip(("out", "lse"), cotangents, strict=True))
    return TorchPrograms(
        attend=attend,
        tensors=tensors,
        trained=floats,
        fixed=variant.fixed,
        cotangents={n: _heads_first(x, place) for n, x in both.items()},
        ours=_ours,
        place=place,
    ), None


def decode(variant, given, place: Place):
    """A step of decoding: (`TorchSteps`, None), or (None, why it cannot)."""
    reason = _missing(variant, place)
    if reason is not None:
        return None, reason
    qkv, operands = given
    tensors = _bring(qkv, operands, place)
    run_it = attention(variant.spec, tensors, place)

    def step(q):
        return run_it(q, tensors["k"], tensors["v"], tensors)[0]

    ours = {"q": tensors["q"], "step": step, "ours": lambda x: x.transpose(1, 2)}
    return device_torch.TorchSteps(place=place, **ours), None


def _ours(name: str, x):
    return x.transpose(1, 2) if name in ("out", "lse", "q", "k", "v") else x


def _missing(variant, place: Place) -> str | None:
    if isinstance(variant, device_cases.LinearVariant):
        return "does not exist for linear_attention"
    reason = device_torch.missing(place)
    if reason is None and flex_attention is None:
        reason = REASON
    return reason or refusal(variant.spec)
