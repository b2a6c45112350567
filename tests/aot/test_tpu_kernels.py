"""The TPU attention kernels through the TPU's own compiler: pytest -m aot."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attnjax import kernels
from attnjax.kernels import AttentionSpec
from attnjax.planning import targets

MIB = 2**20
VMEM = {"v5e:1x1": 16 * MIB, "v6e:1x1": 32 * MIB}
CAUSAL = kernels.Causal()
IDS = {name: ((1, 2048), jnp.int32) for name in ("q_segment_ids", "k_segment_ids")}
ROWS = {
    name: ((1, 1, 2048), jnp.float32) for name in ("visible_keys", "sharpen_offset")
}
FULL_BIAS = {"bias": ((1, 8, 2048, 2048), jnp.bfloat16)}


def tilted(s, b, h, q, k, strength, tilt):
    return s * (1 + tilt) - strength * jnp.log((q - k + 1).astype(s.dtype))


TILT = {"strength": ((8,), jnp.float32), "tilt": ((1, 1, 2048), jnp.float32)}
TILTED = kernels.ScoreFn(tilted, ("strength", "tilt"), ("head", "column"))
# Name -> chip, spec, operands, key/value heads, D, E.
CASES = {
    "causal": ("v5e:1x1", AttentionSpec(mask=CAUSAL), {}, 8, 128, 128),
    "causal on v6e, wide": ("v6e:1x1", AttentionSpec(mask=CAUSAL), {}, 8, 256, 256),
    "window, sigmoid, narrow": (
        "v5e:1x1",
        AttentionSpec(
            mask=kernels.SlidingWindow(255), weight_map=kernels.Sigmoid(-7.0)
        ),
        {},
        4,
        80,
        64,
    ),
    "packed, capped, sink": (
        "v5e:1x1",
        AttentionSpec(
            mask=CAUSAL & kernels.Segments(),
            score=kernels.SoftCap(30.0),
            weight_map=kernels.Softmax(sink="logit"),
            return_lse=True,
        ),
        IDS | {"sink": ((8,), jnp.float32)},
        2,
        128,
        128,
    ),
    "bias": ("v5e:1x1", AttentionSpec(score=kernels.Bias()), FULL_BIAS, 8, 64, 64),
    "distances, blocks of heads": (
        "v6e:1x1",
        AttentionSpec(
            mask=CAUSAL & kernels.BlockMask(64, 64), score=kernels.RelativeBias(128)
        ),
        {
            "relative_bias": ((8, 257), jnp.float32),
            "block_mask": ((1, 8, 32, 32), jnp.bool_),
        },
        2,
        128,
        128,
    ),
    "second pass": (
        "v5e:1x1",
        AttentionSpec(
            mask=CAUSAL,
            weight_map=kernels.SoftplusL1(),
            reweight=kernels.Sharpen(),
            epilogue=kernels.HeadScale(),
        ),
        ROWS | {"head_scale": ((8,), jnp.float32)},
        2,
        128,
        128,
    ),
    "score function": (
        "v5e:1x1",
        AttentionSpec(mask=CAUSAL, score=TILTED),
        TILT,
        2,
        128,
        128,
    ),
}


@pytest.fixture(scope="module")
def chip():
    """Name -> a described device; libtpu may be open in another process too."""
    lacking = targets.missing_extra("tpu")
    if lacking is not None:
        pytest.skip(lacking)
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

    def describe(name):
        target = targets.parse(name)
        targets.prepare(target)
        return targets.devices(target), target.kernel_target

    return describe


@pytest.mark.aot
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_compile_and_fit(name, chip):
    where, spec, operands, kv_heads, d, e = CASES[name]
    (device, *_), target = chip(where)

    def shape(*sizes, dtype=jnp.bfloat16):
        place = SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    q, k = shape(1, 2048, 8, d), shape(1, 2048, kv_heads, d)
    v = shape(1, 2048, kv_heads, e)
    given = {n: shape(*size, dtype=dtype) for n, (size, dtype) in operands.items()}
    names = {operand.name for operand in spec.operands if operand.trains}
    trained = {n: x for n, x in given.items() if n in names}
    fixed = {n: x for n, x in given.items() if n not in names}

    def total(q, k, v, trained, fixed):
        out = kernels.attention(
            q,
            k,
            v,
            spec,
            trained | fixed,
            implementation="mosaic_tpu",
            target=target,
        )
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(out))

    step = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
    text = step.lower(q, k, v, trained, fixed).compile().as_text()
    found = vmem_of_kernels(text)
    more = 2 if spec.reweight is not None else int("bias" in given)
    assert len(found) == 3 + more
    print(f"{name}: bytes of VMEM: {found}")
    assert all(0 < used <= VMEM[where] for used in found.values()), found
    # Scores exist in tiles alone, but for a bias, which is an array already.
    if "bias" not in given:
        assert "2048,2048" not in text


DECODED = {
    "causal": (1, AttentionSpec(mask=CAUSAL)),
    "window, capped, sink": (
        4,
        AttentionSpec(
            mask=kernels.SlidingWindow(1023, 0, sinks=4),
            score=(kernels.SoftCap(30.0), kernels.ALiBi()),
            weight_map=kernels.Softmax(sink="logit"),
            return_lse=True,
        ),
    ),
    "sigmoid": (1, AttentionSpec(mask=CAUSAL, weight_map=kernels.Sigmoid(-9.0))),
}


@pytest.mark.aot
@pytest.mark.parametrize("name", DECODED)
def test_a_step_of_decoding_reads_a_long_cache_in_place(name, chip):
    (device, *_), target = chip("v5e:1x1")
    t, spec = DECODED[name]
    place = SingleDeviceSharding(device)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    operands = {x.name: shape(32, dtype=jnp.float32) for x in spec.operands}
    operands["q_offset"] = shape(8, dtype=jnp.int32)
    q, cache = shape(8, t, 32, 128), shape(8, 32768, 8, 128)

    def step(q, k, v, operands):
        return kernels.attention(q, k, v, spec, operands, target=target)

    done = jax.jit(step).lower(q, cache, cache, operands).compile()
    (used,) = vmem_of_kernels(done.as_text()).values()
    print(f"{name}: {used} bytes of VMEM")
    assert 0 < used <= VMEM["v5e:1x1"]
    # The cache is 2^30 bytes: it is neither copied nor rearranged.
    assert done.memory_analysis().temp_size_in_bytes < MIB


@pytest.mark.aot
@pytest.mark.parametrize("sequence", [1, 4])
def test_each_chip_of_a_mesh_runs_the_kernels(sequence, chip):
    """Cut by batch and heads, or by tokens with keys going round the ring."""
    devices, target = chip("v5e:2x2")
    sizes = (1, 1, 4) if sequence == 4 else (2, 2, 1)
    mesh = Mesh(np.array(devices).reshape(sizes), ("data", "tensor", "sequence"))
    place = NamedSharding(mesh, P("data", "sequence", "tensor"))

    def shape(heads):
        return jax.ShapeDtypeStruct((2, 2048, heads, 64), jnp.bfloat16, sharding=place)

    def total(q, k, v):
        spec = AttentionSpec(mask=CAUSAL)
        out = kernels.sharded_attention(q, k, v, spec, mesh=mesh, target=target)
        return out.astype(jnp.float32).sum()

    with kernels.watching() as watch:
        step = jax.jit(jax.grad(total, (0, 1, 2)))
        text = step.lower(shape(4), shape(2), shape(2)).compile().as_text()
    assert {choice.used for choice in watch.choices} == {"mosaic_tpu"}
    assert len(vmem_of_kernels(text)) >= 3
    assert ("collective-permute" in text) == (sequence == 4)


def vmem_of_kernels(text: str) -> dict[str, int]:
    """Bytes of VMEM that the compiler gave each Pallas kernel of a module."""
    found = {}
    for number, line in enumerate(text.splitlines()):
        if "tpu_custom_call" in line:
            name = re.search(r"attention_([a-z_]+[a-z])", line).group(1)
            pattern = r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"'
            found[f"{name} in line {number}"] = int(re.search(pattern, line).group(1))
    return found
