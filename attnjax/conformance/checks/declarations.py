"""What SPEC and Config declare: counts, costs, JSON, and what must be refused."""

import json

import jax
import numpy as np

from attnjax.conformance import samples
from attnjax.conformance.expect import ViolationError, expect
from attnjax.conformance.subject import Subject
from attnjax.core import discovery, schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError


def well_formed(s: Subject) -> None:
    """SPEC, Config and Mixer or preset are as discovery wants them; texts exist."""
    discovery.check(s.module)
    for name in ("title", "family"):
        expect(bool(getattr(s.spec, name)), f"SPEC.{name} must not be empty.")
    expect(bool(s.spec.forms), "SPEC.forms must name at least one form.")
    can = s.spec.capabilities
    expect(
        can.causal or can.bidirectional or can.cross,
        "SPEC.capabilities must declare causal, bidirectional or cross.",
    )
    expect(
        not can.needs_grid or (bool(can.grid) and s.settings.grid is not None),
        'needs a grid: SPEC.capabilities.grid and CONFORMANCE["grid"] must say which.',
    )
    expect(
        bool(can.grid) or not can.extra_tokens,
        "SPEC.capabilities.extra_tokens goes with grid ranks; got grid=().",
    )


def parameter_count(s: Subject) -> None:
    """SPEC.parameter_count is the number of parameters built, with biases too."""
    for changes in ({}, {"use_bias": True}, {"qk_norm": True, "num_kv_heads": None}):
        changes = {k: s.dims.num_heads if v is None else v for k, v in changes.items()}
        other = Subject(s.module, overrides=s.options, dims=changes)
        params, _ = jax.eval_shape(lambda o=other: o.init(0))
        have = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
        told = s.spec.parameter_count(other.config, other.dims)
        expect(
            have == told,
            f"SPEC.parameter_count must be what is built; got {told}, built {have} "
            f"with dims {changes or 'as they are'}.",
        )


def flops(s: Subject) -> None:
    """SPEC.flops is positive and grows with the sequence."""
    short, long = (float(s.spec.flops(s.config, s.dims, n)) for n in (16, 64))
    expect(
        0 < short < long,
        f"SPEC.flops must be positive and grow with seq_len; got {short} at 16 and "
        f"{long} at 64 tokens.",
    )


def config_round_trip(s: Subject) -> None:
    """A Config survives JSON, and is filled and checked by its dataclass."""
    text = json.dumps(schema.to_json(s.config))
    again = schema.build(
        s.module.Config, schema.resolve(s.module.Config, json.loads(text))
    )
    expect(again == s.config, f"Config must survive JSON; got {again}, {s.config}.")
    expect(hash(again) == hash(s.config), "Config must be hashable by value.")
    try:
        schema.resolve(s.module.Config, {"no_such_option": 1}, path=s.spec.name)
    except UserError:
        return
    raise ViolationError("Config must refuse an unknown option.")


def undeclared_is_refused(s: Subject) -> None:
    """Every request that SPEC does not declare raises a UserError with the name."""
    can = s.spec.capabilities
    x, ctx = samples.sample(s)
    ids = np.ones(x.shape[:2], np.int32)
    requests = {
        "ctx.causal=True": (not can.causal, {"causal": True}),
        "ctx.causal=False": (not can.bidirectional, {"causal": False}),
        "ctx.segment_ids": (not can.segments, {"segment_ids": ids}),
        "ctx.prefix_len": (
            not can.prefix,
            {"prefix_len": np.full(2, 3, np.int32), "causal": True},
        ),
        "ctx.memory": (not can.cross, {"memory": x}),
        "ctx.sequence_form": (not can.sequence, {"sequence_form": "ring"}),
        "no ctx.grid": (can.needs_grid, {"grid": None}),
        "ctx.grid of another rank": (
            bool(can.grid) and len(can.grid) < 3,
            {"grid": _foreign_grid(can.grid, s.length)},
        ),
        "ctx.extra_tokens": (
            bool(can.grid) and not can.extra_tokens,
            {"grid": _after_one_token(can.grid, s.length), "extra_tokens": 1},
        ),
        "an unknown hook": (True, {"hooks": (Hook("probe", "no_such_thing"),)}),
    }
    for what, (is_undeclared, changes) in requests.items():
        if is_undeclared:
            _expect_refused(s, what, lambda c=changes: _full(s, x, ctx.replace(**c)))
    if not can.decode:
        _expect_refused(s, "decoding", lambda: _one_step(s, x, ctx))
    elif not can.cross:
        _expect_refused(s, "init_state(memory)", lambda: s.build().init_state(2, 8, x))


def _full(s: Subject, x, ctx):
    return s.call(s.init(0), x, ctx)


def _one_step(s: Subject, x, ctx):
    mixer = s.build()
    if not hasattr(mixer, "init_state"):
        raise UserError(f"{s.spec.name}: has no decode form")
    return mixer.step(x, s.new_state(mixer, 2, s.length), ctx)


def _foreign_grid(ranks, length: int) -> tuple[int, ...]:
    for rank in (1, 2, 3):
        if rank not in ranks:
            return (length,) + (1,) * (rank - 1)
    return (length,)


def _after_one_token(ranks, length: int) -> tuple[int, ...]:
    """A grid of a declared rank behind one token."""
    return (length - 1,) + (1,) * (ranks[0] - 1) if ranks else ()


def _expect_refused(s: Subject, what: str, call) -> None:
    known_as = {s.spec.name}
    if hasattr(s.module, "preset"):
        known_as.add("attention")
    try:
        jax.eval_shape(call)
    except (UserError, NotImplementedError) as error:
        text = str(error).lower()
        expect(
            any(name.lower() in text for name in known_as),
            f"the refusal of {what} must name the mechanism; got {error}",
        )
        return
    except Exception as error:
        raise ViolationError(
            f"{what} is not declared and must be refused with a UserError; got "
            f"{type(error).__name__}: {error}"
        ) from error
    raise ViolationError(
        f"{what} is not declared in SPEC.capabilities and must be refused; "
        "it was accepted."
    )
