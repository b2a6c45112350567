"""Sizes of an attention layer: its heads, parameters, decode state and FLOPs.

`config` is an `attention.Config` throughout.
"""

from collections.abc import Callable
from typing import Any

from attnjax import nn
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.mixers.slots import options
from attnjax.mixers.slots.base import Heads


def counts_of(layer_of: Callable[[Any], Any]) -> dict[str, Callable]:
    """What a mechanism that is a setting of attention counts, as entries of its SPEC.

    Args:
        layer_of: from the mechanism's config to the `attention.Config` that it is.
    """
    return {
        "parameter_count": lambda c, dims: parameter_count(layer_of(c), dims),
        "state_size": lambda c, dims, max_len: state_size(layer_of(c), dims, max_len),
        "flops": lambda c, dims, seq_len: flops(layer_of(c), dims, seq_len),
    }


def heads_of(config, dims: MixerDims) -> Heads:
    """Head sizes of a layer: the config's, else the model's (a model that shares no
    key/value heads stays so with another number of heads).

    Raises:
        UserError: when they do not fit one another.
    """
    num_heads = config.num_heads or dims.num_heads
    num_kv_heads = config.num_kv_heads or dims.num_kv_heads
    if config.num_kv_heads is None and dims.num_kv_heads == dims.num_heads:
        num_kv_heads = num_heads
    head_dim = config.head_dim or dims.head_dim
    if num_heads % num_kv_heads:
        fitting = [str(k) for k in range(1, num_heads + 1) if num_heads % k == 0]
        raise UserError(
            "attention: num_heads must be a multiple of num_kv_heads; got num_heads="
            f"{num_heads}, num_kv_heads={num_kv_heads}. Use one of "
            f"{', '.join(fitting)} kv heads."
        )
    if rope_of(config, dims) is not None and head_dim % 2:
        raise UserError(
            f"attention: head_dim must be even for rotary positions; got "
            f"head_dim={head_dim}. Change it, or set positions=none."
        )
    return Heads(num_heads, num_kv_heads, head_dim, config.value_head_dim or head_dim)


def rope_of(config, dims: MixerDims) -> nn.Rope | None:
    """The layer's rotary settings, or None; on a grid where the model's tokens lie on
    one."""
    if config.cross or config.positions in ("alibi", "none"):
        return None
    own = config.rope or dims.rope
    if config.positions == "rope":
        own = own or nn.Rope()
    return nn.rope_on_grid(own, dims.grid, dims.prefix_tokens)


def own(value: bool | None, inherited: bool) -> bool:
    """A setting of the layer, or the model's where it is None."""
    return inherited if value is None else value


def parameter_count(config, dims: MixerDims) -> int:
    """Parameters of one layer, its output options included."""
    heads = heads_of(config, dims)
    chosen = options.resolve(config.output, heads)
    after = options.heads_after(chosen, heads)
    into = heads.num_heads * heads.head_dim
    into += heads.num_kv_heads * (heads.head_dim + heads.value_dim)
    count = dims.embed_dim * (into + after.num_heads * after.value_dim)
    count += into * own(config.qkv_bias, dims.use_bias)
    count += dims.embed_dim * own(config.out_bias, dims.use_bias)
    count += 2 * heads.head_dim * own(config.qk_norm, dims.qk_norm)
    count += heads.num_heads * (config.weight_map == "sink_logit")
    for option in chosen:
        count += option.slot.parameter_count(option.config, option.heads, dims)
    return count


def state_size(config, dims: MixerDims, max_len: int) -> int:
    """Keys and values, and for self-attention positions, ids and counters."""
    heads = heads_of(config, dims)
    size = max_len * heads.num_kv_heads * (heads.head_dim + heads.value_dim)
    return size if config.cross else size + 2 * max_len + 2


def flops(config, dims: MixerDims, seq_len: int) -> float:
    """Scores and mixing count every pair of tokens (within the window), causal or
    not, as is usual for model FLOPs."""
    heads = heads_of(config, dims)
    chosen = options.resolve(config.output, heads)
    after = options.heads_after(chosen, heads)
    maps = heads.num_heads * heads.head_dim + after.num_heads * after.value_dim
    maps += heads.num_kv_heads * (heads.head_dim + heads.value_dim)
    seen = seq_len
    if config.window is not None:
        seen = min(seq_len, config.window + config.sinks)
    pairs = 2.0 * seen * heads.num_heads * (heads.head_dim + heads.value_dim)
    total = seq_len * (2.0 * dims.embed_dim * maps + pairs)
    for option in chosen:
        total += option.slot.flops(option.config, option.heads, dims, seq_len)
    return total
