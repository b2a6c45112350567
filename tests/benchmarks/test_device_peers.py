"""Other libraries beside the kernels: reasons, memory, and attention of JAX libraries
called in place of their GPU kernels."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from attnjax import kernels
from attnjax.benchmarks import (
    device_cases,
    device_families,
    device_kernels,
    device_peers,
    device_programs,
    device_torch,
)
from attnjax.benchmarks.device_cases import VARIANTS, Size

H200 = kernels.Target("gpu", "NVIDIA H200")
SMALL = Size(2, 40, 4)


def given_of(name, dtype=jnp.float32):
    """A small variant, whose window ends within its tokens."""
    variant, near = VARIANTS[name], kernels.SlidingWindow(7)
    masks = {"window": near, "packed window": near & kernels.Segments()}
    spec = dataclasses.replace(variant.spec, mask=masks.get(name, variant.spec.mask))
    variant = dataclasses.replace(variant, spec=spec, dims=(16, 16))
    return variant, device_cases.draw(variant, SMALL, seed=1, dtype=dtype)


def refusal(module, name):
    variant, given = given_of(name, jnp.bfloat16)
    request = kernels.make_request(*given[0], variant.spec, given[1], H200)
    return device_families.ATTENTION.modules[module].supports(request)


def errors_of(variant, module, given, monkeypatch):
    """As if there were a GPU."""
    modules = device_families.ATTENTION.modules
    monkeypatch.setattr(type(modules[module]), "supports", lambda *_: None)
    settings = device_kernels.Settings()
    programs, _ = device_programs.find(settings, variant, module, given)
    wanted = device_programs.exact(variant, given)
    return programs, device_programs.distances(programs.values(), wanted)


@pytest.fixture
def xla(monkeypatch):
    """jax.nn's plain formula in cuDNN's place; the calls that were made."""
    calls, plain = [], jax.nn.dot_product_attention

    def attend(q, k, v, bias=None, mask=None, *, implementation, **rest):
        calls.append({"implementation": implementation, "mask": mask} | rest)
        return plain(q, k, v, bias, mask, **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return calls


@pytest.mark.parametrize("name", ["window", "packed", "packed window", "prefix"])
def test_cudnn_is_given_the_mask(name, xla, monkeypatch):
    variant, given = given_of(name)
    assert refusal("cudnn_mask", name) is None
    programs, errors = errors_of(variant, "cudnn_mask", given, monkeypatch)
    assert set(errors) == {"out", "dq", "dk", "dv"}
    assert max(errors.values()) < 2e-6
    (call, *_) = xla
    assert call["implementation"] == "cudnn"
    assert call["mask"].shape[2:] == (40, 40)
    # It is an argument of the program, made before its time begins.
    assert "dense_mask" in programs._given[1]


def test_cudnn_is_given_no_mask_that_it_has_a_flag_for():
    assert refusal("cudnn_mask", "causal 128").endswith("cudnn has one")
    prefixed = kernels.AttentionSpec(
        kernels.Causal() | kernels.Prefix(), score=kernels.SoftCap(3.0)
    )
    variant = dataclasses.replace(VARIANTS["prefix"], spec=prefixed)
    given = device_cases.draw(variant, SMALL, seed=1)
    request = kernels.make_request(*given[0], prefixed, given[1], H200)
    module = device_families.ATTENTION.modules["cudnn_mask"]
    assert module.supports(request) == "is for plain scores here"


@pytest.fixture
def tokamax(monkeypatch):
    """A package in tokamax's place with the documented arguments of its attention."""
    calls = []

    def attend(
        query,
        key,
        value,
        bias=None,
        mask=None,
        *,
        scale=None,
        is_causal=False,
        query_seq_lengths=None,
        key_value_seq_lengths=None,
        local_window_size=None,
        logits_soft_cap=None,
        precision=None,
        implementation=None,
        q_sharding=None,
    ):
        calls.append((implementation, is_causal, local_window_size, mask is not None))
        steps, operands, seen = (), {}, kernels.Full()
        if is_causal:
            seen = kernels.Causal()
        if local_window_size is not None:
            seen = seen & kernels.SlidingWindow(*local_window_size)
        if bias is not None:
            steps, operands = (*steps, kernels.Bias()), {"bias": bias}
        if logits_soft_cap is not None:
            steps = (*steps, kernels.SoftCap(logits_soft_cap))
        if mask is not None:
            seen = seen & kernels.MaskFn(_given, ("given",), ("tile",))
            operands = operands | {"given": mask}
        spec = kernels.AttentionSpec(seen, scale=scale, score=steps)
        return kernels.attention(
            query, key, value, spec, operands, implementation="reference"
        )

    class Tuned:
        entered = 0

        def __enter__(self):
            Tuned.entered += 1

        def __exit__(self, *_):
            pass

    def autotune(program, *arguments):
        jax.eval_shape(program, *arguments)
        return Tuned()

    module = types.ModuleType("tokamax")
    module.dot_product_attention, module.autotune = attend, autotune
    module.calls, module.tuned = calls, Tuned
    monkeypatch.setitem(sys.modules, "tokamax", module)
    return module


def _given(b, h, q, k, given):
    return given


TOKAMAX = {
    "causal 128": (True, None, False),
    "full 64": (False, None, False),
    "grouped heads": (True, None, False),
    "window": (True, (7, 0), False),
    "packed": (False, None, True),
    "soft cap": (True, None, False),
    "bias": (False, None, False),
}


@pytest.mark.parametrize("name", TOKAMAX)
def test_tokamax_is_called_for_what_we_compute(name, tokamax, monkeypatch):
    variant, given = given_of(name)
    assert refusal("tokamax", name) is None
    programs, errors = errors_of(variant, "tokamax", given, monkeypatch)
    assert max(errors.values()) < 2e-6
    assert set(tokamax.calls) == {("mosaic", *TOKAMAX[name])}
    programs.train()(1)
    assert tokamax.tuned.entered == 1


def test_what_tokamax_cannot_compute_has_a_reason(tokamax):
    assert "one SoftCap or one Bias" in refusal("tokamax", "ALiBi")
    for name in ("learned sink", "sigmoid", "clipped", "gate"):
        assert refusal("tokamax", name).startswith("computes plain softmax")
    assert refusal("tokamax", "log-sum") == "returns no log-sum"


def test_without_tokamax_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    told = refusal("tokamax", "causal 128")
    assert told.startswith("cannot be imported (")
    assert told.endswith("pip install tokamax")


def test_without_pytorch_peers_say_so(monkeypatch):
    monkeypatch.setattr(device_torch, "torch", None)
    monkeypatch.setattr(device_torch, "REASON", "not here", raising=False)
    variant, given = given_of("soft cap")
    linear = device_cases.LINEAR_VARIANTS["linear delta"]
    for name, asked in (("flex", variant), ("fla", linear)):
        peer = device_peers.PEERS[name]
        assert peer.programs(asked, given, device_torch.GPU) == (None, "not here")


def test_memory_is_left_to_pytorch_unless_the_user_says_otherwise():
    environment = {}
    device_peers.share_memory(environment)
    assert environment == {
        "XLA_CLIENT_MEM_FRACTION": "0.6",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        own = {name: "0.3", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
        kept = dict(own)
        device_peers.share_memory(own)
        assert own == kept


@pytest.mark.parametrize("error", [0.021, float("inf"), float("nan")])
def test_what_is_too_far_away_is_something_else(error):
    told = device_peers.disagreement({"out": 0.001, "dq": error, "d bias": 0.09})
    assert told.startswith("computes something else: dq is ")
    assert device_peers.disagreement({"out": 0.02, "d bias": 0.1}) is None
    assert "d bias is 0.11" in device_peers.disagreement({"d bias": 0.11})
