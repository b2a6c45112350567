"""A mechanism for tests that uses everything the contract offers.

y_t = (1 + layer / 10) W_o mean_{s<=t} (W_v (x_s + stream_s)); a running mean of x, a
loss, a hook on the heads, an extra residual stream and a metric.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import MixerOut
from attnjax.core.spec import Capabilities, Decode, MixerSpec


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        stream: whether it reads and writes the extra stream "side".
        gain: factor on the output.
    """

    stream: bool = False
    gain: float = 1.0


SPEC = MixerSpec(
    name="busy",
    title="Busy",
    family="test",
    paper="",
    source="",
    forms=("reference",),
    capabilities=Capabilities(decode=False, segments=False),
    decode=Decode(),
    parameter_count=lambda config, dims: 2 * dims.embed_dim**2,
    state_size=lambda config, dims, max_len: 0,
    flops=lambda config, dims, seq_len: 4.0 * seq_len * dims.embed_dim**2,
)


def streams(config, dims, prng_key):
    """The start of the extra stream, [1, S, C]."""
    if not config.stream:
        return {}
    return {"side": jax.random.normal(prng_key, (1, dims.max_len, dims.embed_dim))}


class Mixer(nnx.Module):
    def __init__(self, config, dims, *, rngs):
        self.config = config
        dim = dims.embed_dim
        make = dict(std=0.2, dtype=dims.dtype, param_dtype=dims.param_dtype, rngs=rngs)
        self.value = nn.Linear(dim, dim, **make)
        self.out = nn.Linear(dim, dim, **make)
        self.mean = nn.buffer(jnp.zeros((dim,), dims.param_dtype))
        self.count = nn.buffer(jnp.zeros((), jnp.int32))

    def __call__(self, x, ctx):
        value = x + ctx.streams["side"] if self.config.stream else x
        value = self.value(value)
        seen = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        heads = jnp.cumsum(value, axis=1) / seen
        records = {"busy_size": jnp.mean(jnp.square(heads))}
        for hook in ctx.hooks:
            if hook.action == "scale":
                heads = heads * ctx.interventions[hook.name]
            else:
                records[hook.name] = heads
        depth = 1 + jnp.asarray(ctx.layer_index, x.dtype) / 10
        y = self.config.gain * depth * self.out(heads)
        if ctx.train:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jnp.mean(x, axis=(0, 1))
            self.count[...] = self.count[...] + 1
        losses = {"busy": 0.01 * jnp.mean(jnp.square(y))}
        side = {"side": self.value(ctx.streams["side"])} if self.config.stream else {}
        return y, MixerOut(losses=losses, records=records, streams=side)
