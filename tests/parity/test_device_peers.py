"""What the fused kernels are timed beside: FlexAttention run eagerly on the CPU, and
flash-linear-attention's arguments by a loop over tokens in its place (its kernels need
a GPU)."""

import dataclasses
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")

from torch.nn.attention import flex_attention as torch_flex  # noqa: E402

from attnjax import kernels  # noqa: E402
from attnjax.benchmarks import (  # noqa: E402
    device_cases,
    device_decode,
    device_fla,
    device_flex,
    device_kernels,
    device_peers,
    device_programs,
    device_torch,
)
from attnjax.benchmarks.device_cases import (  # noqa: E402
    LINEAR_VARIANTS,
    VARIANTS,
    Size,
)

pytestmark = pytest.mark.parity
EAGER = device_torch.Place("cpu", compile=False, gradients=False)
TAPED = dataclasses.replace(EAGER, gradients=True)
SMALL = Size(2, 133, 4)
# Windows and reaches that end within 133 tokens; as many blocks as there are there.
NEAR = kernels.SlidingWindow(23)
SMALLER = {
    "window": {"mask": NEAR},
    "packed window": {"mask": NEAR & kernels.Segments()},
}
FLEX = (
    *("causal 128", "full 64", "grouped heads", "latent 192/128", "log-sum"),
    *("window", "packed", "packed window", "prefix", "soft cap", "ALiBi"),
    *("score function", "bias", "bias, one row", "causal bias", "learned sink"),
    *("off by one", "bounded", "distances", "block mask"),
)
# The same as others, with other head sizes.
RESIZED = "full 128", "causal 64", "causal 256", "soft cap 64"


def variant_of(name):
    variant = VARIANTS[name]
    spec = dataclasses.replace(variant.spec, **SMALLER.get(name, {}))
    return dataclasses.replace(variant, spec=spec)


def errors_of(programs, variant, given):
    wanted = device_programs.exact(variant, given)
    return device_programs.distances(programs.values(), wanted)


@pytest.fixture
def reach(monkeypatch):
    """A table of distances that ends within the tokens."""
    monkeypatch.setattr(device_cases, "REACH", 23)
    score = kernels.RelativeBias(23)
    spec = dataclasses.replace(VARIANTS["distances"].spec, score=score)
    changed = dataclasses.replace(VARIANTS["distances"], spec=spec)
    monkeypatch.setitem(VARIANTS, "distances", changed)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """FlexAttention without torch.compile around its formula, which takes seconds."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def dense(q, k, v, *, score_mod, block_mask, scale, enable_gqa, return_aux):
    """FlexAttention as its documentation describes it, with a tape."""
    dtype = q.dtype
    q, k, v = (x.float() for x in (q, k, v))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    b, h, t, j = (torch.arange(n) for n in s.shape)
    places = b[:, None, None, None], h[:, None, None], t[:, None], j
    places = torch.broadcast_tensors(*places)
    if score_mod is not None:
        s = score_mod(s, *places)
    if block_mask is not None:
        s = s.masked_fill(~block_mask.mask_mod(*places), -torch.inf)
    lse = torch.logsumexp(s, dim=-1)
    out = (torch.softmax(s, dim=-1) @ v).to(dtype)
    return (out, types.SimpleNamespace(lse=lse)) if return_aux else out


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_computes_the_variant(name, reach, monkeypatch):
    variant = variant_of(name)
    given = device_cases.draw(variant, SMALL, seed=3, dtype=jnp.float32)
    wanted = device_programs.exact(variant, given)
    programs, reason = device_flex.programs(variant, given, EAGER)
    assert reason is None
    errors = device_programs.distances(programs.values(), wanted)
    assert set(errors) == ({"out", "lse"} if name == "log-sum" else {"out"})
    assert max(errors.values()) < 2e-6
    assert programs.train() is None
    programs.forward()(2)
    # Gradients come back in the layout and under the names of ours.
    monkeypatch.setattr(device_flex, "flex_attention", dense)
    programs, _ = device_flex.programs(variant, given, TAPED)
    errors = device_programs.distances(programs.values(), wanted)
    assert set(errors) == set(wanted)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in FLEX + RESIZED])
def test_what_flex_attention_cannot_express_has_a_reason(name):
    programs, reason = device_flex.programs(VARIANTS[name], None, EAGER)
    assert programs is None
    assert any(
        words in reason for words in ("softmax weights alone", "epilogue", "one pass")
    )


def test_functions_and_masks_that_are_not_written_are_named():
    spec = kernels.AttentionSpec(score=kernels.ScoreFn(lambda_of, (), ()))
    assert "is not written here for <function lambda_of" in device_flex.refusal(spec)
    spec = kernels.AttentionSpec(mask=kernels.Causal() & kernels.Dilated(3))
    assert "is not written here for Dilated" in device_flex.refusal(spec)


def lambda_of(s, b, h, q, k):
    return s


@pytest.mark.parametrize("name", device_cases.DECODE_VARIANTS)
def test_flex_attention_decodes(name):
    variant = device_cases.DECODE_VARIANTS[name]
    if variant.keys is not None:
        spec = kernels.AttentionSpec(kernels.SlidingWindow(23, sinks=4))
        variant = dataclasses.replace(variant, spec=spec)
    given = device_cases.draw_decode(variant, Size(2, 133, 8), seed=5, dtype="float32")
    steps, reason = device_flex.decode(variant, given, EAGER)
    assert reason is None
    wanted = device_decode.exact(variant, given)
    assert device_programs.distances(steps.values(), wanted)["out"] < 2e-6
    steps.chain(2)(1)


def test_steps_of_flex_attention_are_chained():
    variant = device_cases.DECODE_VARIANTS["decode all keys"]
    given = device_cases.draw_decode(variant, Size(2, 133, 8), seed=5, dtype="float32")
    steps, _ = device_flex.decode(variant, given, EAGER)
    (q, k, v), _ = given
    for _ in range(3):
        q = kernels.attention(q, k, v, variant.spec, implementation="reference")
    got = device_torch.to_numpy(steps.ours(steps._chain(3)()))
    np.testing.assert_allclose(got, q, atol=1e-6)


def test_bits_of_bfloat16_are_kept():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.bfloat16)
    tensor = device_torch.to_torch(x, EAGER)
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(
        device_torch.to_numpy(tensor), np.asarray(x, np.float32)
    )


def recurrence(q, k, v, g=None, g_gamma=None, beta=None, scale=None, **rest):
    """What fla's functions are documented to compute, token by token: q, k [B, T, H,
    K], v [B, T, HV, V], g log-decays [B, T, HV] or [B, T, HV, K], g_gamma [H]."""
    initial_state, with_state = (
        rest.pop("initial_state"),
        rest.pop("output_final_state"),
    )
    borders = rest.pop("cu_seqlens", None)
    assert not rest
    assert initial_state is None
    assert g is None or g_gamma is None
    dtype, shared = q.dtype, v.shape[2] // q.shape[2]
    q, k, v = (x.float() for x in (q, k, v))
    q, k = (x.repeat_interleave(shared, dim=2) for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    if g_gamma is not None:
        g = g_gamma.detach().expand(k.shape[:3])
    if g is not None and g.dim() == 3:
        g = g[..., None]
    if borders is None:
        parts = [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    else:
        assert borders.dtype == torch.long
        assert q.shape[0] == 1
        ends = borders.tolist()
        parts = [(0, *ends[i : i + 2]) for i in range(len(ends) - 1)]
    outs, states = [], []
    for row, start, end in parts:
        state = torch.zeros(k.shape[2], k.shape[3], v.shape[3])
        for t in range(start, end):
            if g is not None:
                state = state * g[row, t].exp()[..., None]
            value = v[row, t]
            if beta is not None:
                held = torch.einsum("hk,hkv->hv", k[row, t], state)
                value = beta[row, t][:, None] * (value - held)
            state = state + k[row, t][..., None] * value[:, None]
            outs.append(torch.einsum("hk,hkv->hv", q[row, t], state))
        states.append(state)
    out = torch.stack(outs).reshape(v.shape).to(dtype)
    return out, torch.stack(states) if with_state else None


@pytest.fixture
def fla(monkeypatch):
    """A package in fla's place with its functions, each of which takes only its own
    arguments."""
    own = {
        ("simple_gla", "chunk_simple_gla"): {"g", "g_gamma"},
        ("gla", "chunk_gla"): {"g"},
        ("delta_rule", "chunk_delta_rule"): {"beta"},
        ("gated_delta_rule", "chunk_gated_delta_rule"): {"g", "beta"},
        ("kda", "chunk_kda"): {"g", "beta"},
    }
    everyones = {"q", "k", "v", "scale", "initial_state", "output_final_state"}
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    called = []
    for (module, function), names in own.items():
        legal = everyones | names | {"cu_seqlens"}
        made = types.ModuleType(f"fla.ops.{module}")

        def call(*, function=function, legal=legal, **given):
            assert set(given) <= legal
            called.append(function)
            return recurrence(**given)

        setattr(made, function, call)
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return called


FUNCTIONS = {
    "linear plain": "chunk_simple_gla",
    "linear retention": "chunk_simple_gla",
    "linear retention 64": "chunk_simple_gla",
    "linear token decay": "chunk_simple_gla",
    "linear token decay, packed": "chunk_simple_gla",
    "linear channel decay": "chunk_gla",
    "linear delta": "chunk_delta_rule",
    "linear gated delta": "chunk_gated_delta_rule",
    "linear gated delta 16/32": "chunk_gated_delta_rule",
    "linear gated delta 64": "chunk_gated_delta_rule",
    "linear channel delta": "chunk_kda",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fla_is_called_for_what_we_compute(name, fla):
    variant = dataclasses.replace(LINEAR_VARIANTS[name], dims=(8, 12))
    given = device_cases.draw(variant, Size(2, 29, 4), seed=6, dtype=jnp.float32)
    programs, reason = device_fla.programs(variant, given, TAPED)
    assert reason is None
    errors = errors_of(programs, variant, given)
    wanted = set(device_programs.exact(variant, given))
    # A constant decay has no gradient in fla.
    constant = {"d log_decay"} if variant.spec.decay == "head" else set()
    assert set(errors) == wanted - constant
    assert max(errors.values()) < 1e-5
    assert set(fla) == {FUNCTIONS[name]}
    programs.forward()(1)
    programs.train()(1)


@pytest.mark.parametrize("name", [n for n in LINEAR_VARIANTS if n not in FUNCTIONS])
def test_what_fla_has_no_kernel_for_has_a_reason(name):
    programs, reason = device_fla.programs(LINEAR_VARIANTS[name], None, TAPED)
    assert programs is None
    assert reason in (
        "divides by the normaliser outside its kernels",
        "has no query heads that share a key/value head",
    )


def test_without_fla_the_reason_says_what_to_install():
    variant = LINEAR_VARIANTS["linear delta"]
    given = device_cases.draw(variant, Size(1, 8, 2), seed=0)
    programs, reason = device_fla.programs(variant, given, TAPED)
    assert programs is None
    assert "has no fla.ops.delta_rule.chunk_delta_rule here" in reason
    assert "pip install 'flash-linear-attention[cuda]'" in reason


def test_without_cuda_nothing_is_timed():
    given = device_cases.draw(VARIANTS["ALiBi"], Size(1, 8, 2), seed=0)
    for name, variant in (
        ("flex", VARIANTS["ALiBi"]),
        ("fla", LINEAR_VARIANTS["linear delta"]),
    ):
        programs, reason = device_peers.PEERS[name].programs(
            variant, given, device_torch.GPU
        )
        assert programs is None
        assert "finds no CUDA device" in reason


def test_the_script_checks_and_times_peers(fla, tmp_path, monkeypatch):
    """Rows with both peers, ours in interpret mode."""
    monkeypatch.setattr(device_flex, "flex_attention", dense)
    mask = kernels.AttentionSpec(kernels.Causal(), score=kernels.ALiBi())
    linear = dataclasses.replace(LINEAR_VARIANTS["linear gated delta"], dims=(64, 64))
    settings = device_kernels.Settings(
        variants={
            "ALiBi": device_cases.Variant(mask, (64, 64), fixed=("alibi_slopes",)),
            "gated delta": linear,
        },
        checked=Size(1, 21, 2),
        timed_variant=Size(1, 21, 2),
        timed_linear=Size(1, 21, 2),
        implementations=("blocked", "flex", "fla"),
        place=TAPED,
        rounds=2,
        calls=1,
    )
    rows = device_kernels.run(path=tmp_path / "here.json", settings=settings)["rows"]
    assert rows["check ALiBi"]["refused"] == {"fla": "does not exist for attention"}
    assert "d alibi_slopes" in rows["check ALiBi"]["errors"]["flex"]
    for name, peer in (("ALiBi", "flex"), ("gated delta", "fla")):
        times = rows[f"time {name} S=21"]["times"]
        assert set(times) == {"blocked", peer}
        assert times[peer]["train_ms"] > 0


def test_a_peer_with_another_scale_is_named(fla, tmp_path):
    """fla's own default of the scale would be taken for another computation."""
    variant = dataclasses.replace(LINEAR_VARIANTS["linear delta"], dims=(8, 8))
    given = device_cases.draw(variant, Size(1, 29, 2), seed=0)
    programs, _ = device_fla.programs(variant, given, TAPED)
    inner = programs.attend
    wrong = dataclasses.replace(
        programs, attend=lambda x, more: {n: 1.1 * y for n, y in inner(x, more).items()}
    )
    errors = errors_of(wrong, variant, given)
    assert "computes something else" in device_peers.disagreement(errors)


def test_the_real_function_has_the_arguments_that_are_given():
    import inspect

    names = set(inspect.signature(torch_flex.flex_attention).parameters)
    own = set(inspect.signature(dense).parameters) - {"q", "k", "v"}
    assert own <= names
