"""The script for a GPU, tried on the CPU with tiny shapes: interpreted kernels, and
`blocked` where other libraries stand beside ours."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from attnjax import bench, kernels
from attnjax.benchmarks import (
    device_cases,
    device_decode,
    device_families,
    device_kernels,
    device_peers,
    device_programs,
    device_report,
)
from attnjax.benchmarks.device_cases import (
    DecodeVariant,
    LinearVariant,
    Size,
    Variant,
)
from attnjax.core.errors import UserError
from attnjax.kernels import blocked

TINY = Size(1, 40, 2)
PLAIN = Variant(kernels.AttentionSpec(kernels.Causal()), (8, 8), plain=True)
CAPPED = dataclasses.replace(
    PLAIN, plain=False, spec=device_cases.VARIANTS["soft cap"].spec
)


class Stand:
    """`blocked` in the place of the kernels: the script's logic without their cost."""

    NAME = "mosaic_gpu"
    calls = 0

    def __init__(self, noise=0.0):
        self.noise = noise

    def supports(self, request):
        del request

    def run(self, request, q, k, v, operands):
        out, lse = blocked.run(request, q, k, v, operands)
        return out * (1 + self.noise), lse


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setitem(device_families.ATTENTION.modules, "mosaic_gpu", Stand())
    return device_kernels.Settings(
        variants={"plain": PLAIN, "capped": CAPPED},
        checked=TINY,
        timed=(TINY,),
        timed_variant=TINY,
        implementations=("mosaic_gpu", "cudnn", "blocked"),
        rounds=2,
        calls=1,
    )


def test_checks_come_first_and_a_second_start_goes_on(settings, tmp_path, capsys):
    path = tmp_path / "results" / "here.json"
    part = device_kernels.run("plain", path=path, settings=settings)
    assert list(part["rows"]) == ["check plain", "time plain S=40"]
    stamp = part["rows"]["check plain"]
    assert stamp["verdict"] == "passed"
    assert stamp["repeats"] is True
    assert stamp["yardstick"] == "blocked"
    assert stamp["worst_ratio"] == 1.0
    assert "platform gpu" in stamp["refused"]["cudnn"]
    assert device_kernels.run(path=path, minutes=0, settings=settings)["left"] == [
        "check capped",
        "time capped S=40",
    ]
    rows = device_kernels.run(path=path, settings=settings)["rows"]
    assert rows["check plain"] == stamp
    timed = rows["time capped S=40"]
    assert timed["times"]["blocked"]["forward_ms"] > 0
    assert timed["forward_speedup_over_blocked"]["median"] > 0
    stored = json.loads(path.read_text())
    assert stored["rows"] == rows
    assert stored["machine"]["versions"]["jax"] == jax.__version__
    device_report.print_report(stored)
    shown = capsys.readouterr().out
    assert "check capped" in shown
    assert "0 rows left" in shown


def test_a_wrong_kernel_fails_its_check(settings, monkeypatch):
    monkeypatch.setitem(
        device_families.ATTENTION.modules, "mosaic_gpu", Stand(noise=0.02)
    )
    row = device_kernels.check(settings, PLAIN)
    assert row["verdict"] == "FAILED"
    assert row["worst_ratio"] > device_kernels.ALLOWED


def test_a_kernel_that_fails_does_not_stop_the_others(
    settings, monkeypatch, tmp_path, capsys
):
    def fail(*_):
        raise NotImplementedError("cannot lower\nthis")

    stand = Stand()
    stand.run = fail
    monkeypatch.setitem(device_families.ATTENTION.modules, "mosaic_gpu", stand)
    path = tmp_path / "here.json"
    report = device_kernels.run("check", path=path, settings=settings)
    assert [row["state"] for row in report["rows"].values()] == ["failed", "failed"]
    device_report.print_report(report)
    shown = capsys.readouterr().out
    assert "check plain: FAILED: NotImplementedError: cannot lower" in shown
    assert report["left"] == []


def test_a_row_that_never_finished_is_passed_over(settings, tmp_path, capsys):
    path = tmp_path / "here.json"
    report = device_kernels.run("check plain", path=path, settings=settings)
    report["rows"]["check plain"] = {"state": "begun"}
    path.write_text(json.dumps(report))
    again = device_kernels.run("check plain", path=path, settings=settings)
    device_report.print_report(again)
    assert "begun and never finished: check plain" in capsys.readouterr().out


def test_results_of_another_machine_are_refused(settings, tmp_path):
    path = tmp_path / "here.json"
    path.write_text(json.dumps({"machine": {"device": "NVIDIA H200"}, "rows": {}}))
    with pytest.raises(UserError, match="holds results of another device"):
        device_kernels.run(path=path, settings=settings)


def test_a_filter_without_rows_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match="matches no row; got 'plian'"):
        device_kernels.run("plian", path=tmp_path / "x.json", settings=settings)
    with pytest.raises(UserError, match="needs a GPU; got the cpu"):
        device_kernels.run()


def test_front_door_runs_the_script(monkeypatch, tmp_path, capsys):
    seen = {}

    def run(pattern, *, settings, **rest):
        seen.update(pattern=pattern, left=settings.implementations, **rest)
        return {"machine": {"processor": "p", "cores": 1, "device": "d",
                            "python": "3", "versions": {}}, "rows": {}}  # fmt: skip

    environment = {}
    monkeypatch.setattr(device_kernels, "run", run)
    monkeypatch.setattr(bench.os, "environ", environment)
    file = tmp_path / "here.json"
    command = ["device_kernels", "--filter=check", f"--json={file}", "--minutes=2"]
    bench.main([*command, "--without=fla,flex", "--retry", "--bandwidth=4.8"])
    left = "mosaic_gpu", "blocked", "cudnn", "cudnn_mask", "tokamax"
    more = {"retry": True, "bandwidth": 4.8, "left": left}
    assert seen == {"pattern": "check", "path": file, "minutes": 2.0} | more
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "0 rows left" in capsys.readouterr().out


def test_what_to_leave_out_is_checked():
    with pytest.raises(UserError, match="--without takes some of blocked.*'flax'"):
        device_kernels.settings_without("flex, flax")
    with pytest.raises(UserError, match="got 'mosaic_gpu'"):
        device_kernels.settings_without("mosaic_gpu")
    with pytest.raises(UserError, match="--bandwidth must be above 0"):
        bench.main(["device_kernels", "--bandwidth=0"])


def test_a_recurrence_is_checked_and_timed(monkeypatch, tmp_path):
    modules = device_families.LINEAR.modules
    monkeypatch.setitem(modules, "mosaic_gpu", modules["blocked"])
    spec = kernels.LinearSpec("head", chunk_size=8, return_state=True)
    settings = device_kernels.Settings(
        variants={
            "retention": LinearVariant(
                spec, (8, 8), packed=True, spread=2, fixed=("log_decay",)
            )
        },
        checked=Size(1, 7, 2),
        timed_linear=Size(1, 7, 2),
        rounds=2,
        calls=1,
    )
    report = device_kernels.run(path=tmp_path / "here.json", settings=settings)
    check, time = report["rows"].values()
    assert check["verdict"] == "passed"
    assert check["yardstick"] == "blocked"
    assert set(check["refused"]) == {"cudnn", "cudnn_mask", "tokamax", "flex", "fla"}
    for name in ("cudnn", "cudnn_mask", "tokamax", "flex"):
        assert check["refused"][name] == "does not exist for linear_attention"
    assert {"out", "state", "dq", "dk", "dv", "d log_decay"} == set(
        check["errors"]["mosaic_gpu"]
    )
    assert time["train_speedup_over_blocked"]["median"] > 0
    count = device_cases.flops(settings.variants["retention"], Size(1, 7, 2))
    assert count == 2 * 7 * (4 * 64 + 8 * 16)


def test_value_heads_that_do_not_divide_are_refused():
    spread = device_cases.LINEAR_VARIANTS["linear gated delta 16/32"]
    with pytest.raises(ValueError, match="value heads must be a multiple of 2; got 3"):
        device_cases.draw(spread, Size(1, 4, 3), seed=0)


def test_heads_of_a_recurrence_that_do_not_divide_are_refused():
    grouped = device_cases.LINEAR_VARIANTS["linear grouped heads"]
    with pytest.raises(ValueError, match="heads must be a multiple of 4; got 6"):
        device_cases.draw(grouped, Size(1, 4, 6), seed=0)


class Peer(Stand):
    """Another library's attention, which may be wrong, slow to build or broken."""

    NAME = "cudnn"

    def __init__(self, noise=0.0, error=None):
        super().__init__(noise)
        self.error = error

    def run(self, request, q, k, v, operands):
        if self.error is not None:
            raise self.error
        return super().run(request, q, k, v, operands)


def with_peer(monkeypatch, settings, peer):
    monkeypatch.setitem(device_families.ATTENTION.modules, "cudnn", peer)
    return dataclasses.replace(settings, variants={"capped": CAPPED})


@pytest.mark.parametrize("checked", [True, False])
def test_a_peer_that_computes_something_else_is_named_and_not_timed(
    settings, monkeypatch, tmp_path, checked
):
    settings = with_peer(monkeypatch, settings, Peer(noise=0.03))
    rows = device_kernels.run(
        None if checked else "time", path=tmp_path / "x.json", settings=settings
    )["rows"]
    row = rows["time capped S=40"]
    assert set(row["times"]) == {"mosaic_gpu", "blocked"}
    told = row["refused"]["cudnn"]
    assert re.match(
        r"computes something else: d?\w+ is 0.03\d* away from float64", told
    )
    if checked:  # nor is ours held to it
        assert rows["check capped"]["yardstick"] == "blocked"


def test_a_peer_that_agrees_is_timed_beside_ours(settings, monkeypatch, tmp_path):
    settings = with_peer(monkeypatch, settings, Peer(noise=0.003))
    rows = device_kernels.run(path=tmp_path / "x.json", settings=settings)["rows"]
    row = rows["time capped S=40"]
    assert set(row["times"]) == {"mosaic_gpu", "blocked", "cudnn"}
    assert row["train_speedup_over_cudnn"]["median"] > 0
    # Ours is held to a peer's error, which 0.003 of noise made ten times its own.
    assert rows["check capped"]["yardstick"] == "cudnn"


def test_a_peer_that_fails_says_so_and_ours_is_timed(settings, monkeypatch, tmp_path):
    error = RuntimeError("ptxas\ndied")
    settings = with_peer(monkeypatch, settings, Peer(error=error))
    rows = device_kernels.run(path=tmp_path / "x.json", settings=settings)["rows"]
    assert rows["check capped"]["verdict"] == "passed"
    failed = "failed: RuntimeError: ptxas"
    assert rows["check capped"]["refused"]["cudnn"] == failed
    row = rows["time capped S=40"]
    assert row["refused"]["cudnn"] == f"is not timed unchecked: it {failed}"
    assert set(row["times"]) == {"mosaic_gpu", "blocked"}


def test_rows_that_failed_are_made_again_when_asked(settings, tmp_path):
    path = tmp_path / "here.json"
    report = device_kernels.run("check plain", path=path, settings=settings)
    done = report["rows"]["check plain"]
    for state in ("begun", "failed"):
        report["rows"]["check plain"] = {"state": state, "error": "x"}
        path.write_text(json.dumps(report))
        again = device_kernels.run(
            "check plain", path=path, settings=settings, retry=True
        )
        assert again["rows"]["check plain"] == done


def test_a_device_that_is_lost_ends_the_run(settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device_kernels, "_answers", lambda: False)
    path = tmp_path / "here.json"
    report = device_kernels.run("check", path=path, settings=settings)
    assert report["left"] == ["check capped"]
    assert "does not answer" in capsys.readouterr().out


def test_gradients_that_are_fixed_are_not_timed_but_checked(settings):
    variant = dataclasses.replace(
        device_cases.VARIANTS["score function"], dims=(8, 8), fixed=("strength",)
    )
    assert "d strength" in device_kernels.check(settings, variant)["errors"]["blocked"]
    given = device_cases.draw(variant, TINY, seed=0)
    programs, _ = device_programs.find(settings, variant, "blocked", given)
    assert {"dq", "dk", "dv", "out"} == set(
        jax.eval_shape(programs._gradients(variant.fixed), *given)
    )


STEP = DecodeVariant(
    kernels.AttentionSpec(kernels.SlidingWindow(7, sinks=2)), keys=10, dims=(8, 8)
)


def test_steps_of_decoding_are_checked_and_timed(settings, tmp_path, capsys):
    settings = dataclasses.replace(
        settings,
        variants={"decode": STEP},
        checked_decode=Size(2, 24, 4),
        timed_decode=(Size(2, 16, 4), Size(2, 24, 4)),
        implementations=(*settings.implementations, "fla"),
        steps=3,
    )
    path = tmp_path / "here.json"
    report = device_kernels.run(path=path, settings=settings, bandwidth=0.5)
    check, short, long = report["rows"].values()
    assert check["verdict"] == "passed"
    assert check["yardstick"] == "blocked"
    assert set(check["errors"]["mosaic_gpu"]) == {"out"}
    assert check["refused"]["fla"] == "has no step of decoding"
    # 2 rows, 10 keys, one key/value head for 4, D + E = 16, two bytes.
    assert short["bytes"] == long["bytes"] == 2 * 10 * 16 * 2
    found = long["times"]["mosaic_gpu"]
    assert found["bytes_per_s"] == pytest.approx(640 / (1e-6 * found["us"]))
    device_report.print_report(report)
    shown = capsys.readouterr().out
    assert "time decode S=24 mosaic_gpu" in shown
    share = found["bytes_per_s"] / 0.5e12
    assert f"{share:.0%}" in shown
    assert report["bandwidth"] == 0.5


def test_a_chain_of_steps_takes_each_output_as_the_next_query(settings):
    given = device_cases.draw_decode(STEP, Size(2, 24, 4), seed=0, dtype=jnp.float32)
    steps, _ = device_decode.find(settings, STEP, "blocked", given)
    (q, k, v), operands = given
    seen = []
    compile_only = device_decode.repeater

    def keep(compiled, arrays):
        seen.append(compiled(*arrays))
        return compile_only(compiled, arrays)

    device_decode.repeater = keep
    try:
        steps.chain(2)
    finally:
        device_decode.repeater = compile_only
    for _ in range(2):
        q = kernels.attention(q, k, v, STEP.spec, operands, implementation="reference")
    assert jnp.allclose(seen[0], q, atol=1e-5)


def test_heads_of_decoding_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads must be a multiple of 4 and D equal E"):
        device_cases.draw_decode(STEP, Size(1, 24, 6), seed=0)


def test_reasons_are_shown_once_with_what_to_install(settings, tmp_path, capsys):
    settings = dataclasses.replace(
        settings, implementations=(*settings.implementations, "flex")
    )
    reason = device_peers.PEERS["flex"].programs(PLAIN, None, settings.place)[1]
    report = device_kernels.run("check", path=tmp_path / "x.json", settings=settings)
    device_report.print_report(report)
    shown = capsys.readouterr().out
    assert f"refused in 2 rows: flex {reason}" in shown
    assert "pip install 'flash-linear-attention[cuda]'" in shown


EVERY = device_cases.VARIANTS | device_cases.LINEAR_VARIANTS


@pytest.mark.parametrize("name", EVERY)
def test_every_variant_is_taken_by_the_kernels(name):
    variant = EVERY[name]
    family = device_families.family_of(variant)
    h200 = kernels.Target("gpu", "NVIDIA H200")

    def shapes():
        return device_cases.draw(variant, Size(1, 4, 4), seed=0)[:2]

    qkv, operands = jax.eval_shape(shapes)
    request = family.make_request(*qkv, variant.spec, operands, h200)
    assert family.modules["mosaic_gpu"].supports(request) is None


@pytest.mark.parametrize("name", device_cases.DECODE_VARIANTS)
def test_every_step_of_decoding_is_taken_by_the_kernels(name):
    variant = device_cases.DECODE_VARIANTS[name]
    h200 = kernels.Target("gpu", "NVIDIA H200")

    def shapes():
        return device_cases.draw_decode(variant, Size(8, 4096, 32), seed=0)

    qkv, operands = jax.eval_shape(shapes)
    request = kernels.make_request(*qkv, variant.spec, operands, h200)
    module = device_families.ATTENTION.modules["mosaic_gpu"]
    assert module.supports(request) is None


def test_work_is_counted_as_is_usual():
    size = Size(2, 8192, 16)
    causal, full = (device_cases.VARIANTS[f"{name} 128"] for name in ("causal", "full"))
    assert device_cases.flops(full, size) == 4 * 2 * 16 * 8192**2 * 128
    assert device_cases.flops(causal, size) == device_cases.flops(full, size) / 2


def test_heads_that_do_not_divide_are_refused():
    grouped = device_cases.VARIANTS["grouped heads"]
    with pytest.raises(ValueError, match="heads must be a multiple of 4; got 6"):
        device_cases.draw(grouped, Size(1, 4, 6), seed=0, dtype=jnp.float32)
