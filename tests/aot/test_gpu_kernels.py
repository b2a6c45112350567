"""The Hopper kernels through ptxas for an H200 that is not there: pytest -m aot."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnjax.planning import targets

ROOT = Path(__file__).parents[2]
# (name, spec, H, K, D, E): forward and backward of each become machine code.
CASES = {
    "plain causal 64": "A(C), 2, 1, 64, 64",
    "plain causal 128": "A(C), 2, 1, 128, 128",
    "plain full 128": "A(), 2, 2, 128, 128",
    "plain causal 256": "A(C), 2, 1, 256, 256",
    "latent 192/128": "A(C), 2, 2, 192, 128",
    "packed 128": "A(C & kernels.Segments()), 2, 1, 128, 128",
    "soft cap, ALiBi 128": (
        "A(C, score=(kernels.SoftCap(30.0), kernels.ALiBi())), 2, 1, 128, 128"
    ),
    "bias 64": "A(score=kernels.Bias()), 2, 2, 64, 64",
    "learned sink 128": "A(C, weight_map=kernels.Softmax('logit')), 2, 1, 128, 128",
    "sigmoid 128": "A(C, weight_map=kernels.Sigmoid(-6.0)), 2, 1, 128, 128",
    "softplus 128": "A(C, weight_map=kernels.SoftplusL1()), 2, 1, 128, 128",
    "blocks by head 128": "A(C & kernels.BlockMask(64, 64)), 2, 1, 128, 128",
    "distances 128": "A(C, score=kernels.RelativeBias(127)), 2, 1, 128, 128",
    "clipped 128": "A(C, reweight=kernels.Clip(-0.1, 1.1)), 2, 1, 128, 128",
    "sharpened 64": (
        "A(C, weight_map=kernels.SoftplusL1(), reweight=kernels.Sharpen(15)), 2, 1,"
        " 64, 64"
    ),
    "gated 128": "A(C, epilogue=kernels.OutputGate()), 2, 1, 128, 128",
    "normed, scaled, gated 256": (
        "A(C, epilogue=(kernels.HeadRMSNorm(), kernels.HeadScale(),"
        " kernels.OutputGate())), 2, 1, 256, 256"
    ),
}
# The same, then B, T and S: a step of decoding, forward alone.
DECODED = {
    "causal": "A(C), 32, 8, 128, 128, 8, 1, 32768",
    "window, soft cap, ALiBi, sink": (
        "A(kernels.SlidingWindow(1023, 0, sinks=4), return_lse=True,"
        " score=(kernels.SoftCap(30.0), kernels.ALiBi()),"
        " weight_map=kernels.Softmax('logit')), 32, 8, 128, 128, 8, 4, 32768"
    ),
    "sigmoid": ("A(C, weight_map=kernels.Sigmoid(-9.0)), 32, 8, 128, 128, 8, 1, 32768"),
}
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from attnjax import kernels
from attnjax.kernels import mosaic_gpu

A, C = kernels.AttentionSpec, kernels.Causal()
text = open("attnjax/planning/gpu_targets/h200.txtpb").read()
topology = topologies.get_topology_desc(
    platform="cuda", target_config=text, topology="1x1x1"
)
place = SingleDeviceSharding(topology.devices[0])
target = kernels.Target("gpu", "NVIDIA H200")


def given(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


for name, case in json.loads(sys.argv[1]).items():
    spec, h, kv, d, e, *sizes = eval(case)
    b, t, s = sizes or (2, 512, 512)
    half = jnp.bfloat16
    shapes = ((t, h, d), (s, kv, d), (s, kv, e))
    qkv = [given((b, *shape), half) for shape in shapes]
    sizes = {"b": b, "h": h, "t": t, "s": s, "e": e}
    dtypes = {"int": jnp.int32, "bool": jnp.bool_}
    sizes |= {"r": 255, "m": 8, "n": 8}
    operands = {
        x.name: given(
            tuple(sizes[a] for a in x.shape or x.axes),
            half if x.axes == "bthe" else dtypes.get(x.kind, jnp.float32),
        )
        for x in spec.operands
    }
    if t != s:
        operands["q_offset"] = given((b,), jnp.int32)
    ids = {n: x for n, x in operands.items() if x.dtype in (jnp.int32, jnp.bool_)}
    trained = {n: x for n, x in operands.items() if n not in ids}

    def total(qkv, trained, ids):
        request = kernels.make_request(*qkv, spec, trained | ids, target)
        assert mosaic_gpu.supports(request) is None
        out, _ = mosaic_gpu.run(request, *qkv, trained | ids)
        return out.astype(jnp.float32).sum()

    print("CASE", name, file=sys.stderr, flush=True)
    both = jax.value_and_grad(total, argnums=(0, 1))
    program = jax.jit(both if t == s else total)
    done = program.lower(qkv, trained, ids).compile()
    # What is made beside the arguments: a copied cache would be 2^30 bytes.
    assert t == s or done.memory_analysis().temp_size_in_bytes < 2**24
"""
LINES = re.compile(
    r"CASE (?P<case>.*)|entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores"
    r"|Used (?P<registers>\d+) registers"
)


def compile_all(cases):
    """[(case, kernel, architecture, stack bytes, spilled bytes, registers)]."""
    lacking = targets.missing_extra("gpu")
    if lacking is not None:
        pytest.skip(lacking)
    more = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    more |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        cwd=ROOT,
        env=os.environ | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "C7508" not in done.stdout, "setmaxnreg was ignored"
    assert "wgmma" not in done.stdout, "ptxas serialised matrix products"
    rows, case, row = [], None, []
    for found in LINES.finditer(done.stdout):
        got = found.groupdict()
        if got["case"]:
            case = got["case"]
        elif got["kernel"]:
            row = [case, got["kernel"], got["arch"]]
        elif got["stack"]:
            row += [int(got["stack"]), int(got["stores"])]
        else:
            rows.append((*row, int(got["registers"])))
    return rows


# Bytes that a thread of a backward kernel may keep in local memory, by D: the sums of
# dk and dv, or of dq at D = 256, leave few registers for the scores.
SPILLS = {64: 0, 128: 400, 192: 0, 256: 1000}


@pytest.mark.aot
def test_every_kernel_becomes_hopper_code_and_spills_little():
    rows = compile_all(CASES)
    kernels_of = {case: [row[1] for row in rows if row[0] == case] for case in CASES}
    for case, names in kernels_of.items():
        apart = "256" in case or "192" in case
        # Along diagonals; statistics of rows, and cotangents of their sums.
        more = {"distances 128": 1, "clipped 128": 2, "sharpened 64": 2}.get(case, 0)
        # Going back, what changes finished rows needs the kernels of the plain case
        # alone, which were compiled with that.
        more -= {"gated 128": 2, "normed, scaled, gated 256": 3}.get(case, 0)
        assert len(names) == (4 if apart else 3) + more, f"{case}: {names}"
    for case, kernel, arch, _, spilled, registers in rows:
        note = f"{case}: {kernel}"
        assert arch == "sm_90a", note
        forward = kernel.startswith("attention_forward")
        dim = next(d for d in SPILLS if f", {d}, " in CASES[case])
        # A tile of biases by distance takes registers beside the scores.
        allowed = 8 * case.startswith("distances") if forward else SPILLS[dim]
        # So does what is known of rows that are taken again.
        allowed += 100 * ("reweight" in CASES[case] and not forward)
        assert spilled <= allowed, note
        # 384 threads share 64 Ki registers; each warpgroup then takes its part.
        assert registers == 168, note


@pytest.mark.aot
def test_a_step_of_decoding_becomes_hopper_code_and_copies_no_cache():
    rows = compile_all(DECODED)
    assert [row[0] for row in rows] == list(DECODED)
    for case, kernel, arch, _, spilled, registers in rows:
        assert kernel.startswith("attention_forward"), case
        assert (arch, spilled, registers) == ("sm_90a", 0, 168), case
