"""No dead knobs: every option changes the parameters, the computation, or raises.

An option's effect is looked for in traces (jaxprs without dead code), which compile
nothing: initial values, the training pass, the full pass and its other directions,
decode state and step, and what is declared to be handed on.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from attnjax.conformance import samples
from attnjax.conformance.expect import expect
from attnjax.conformance.subject import Subject, nested, subject
from attnjax.core import schema
from attnjax.core.errors import UserError

REFUSALS = (UserError, ValueError, NotImplementedError)


def options_matter(s: Subject) -> None:
    """Each field of Config has an effect, alone or on top of one of VARIANTS."""
    bases = [{}, *getattr(s.module, "VARIANTS", ())]
    dead = []
    for path, kind, value in leaves(s.module.Config, s.options):
        # A variant that sets the option is the likeliest to show it.
        bases.sort(key=lambda base, p=path: bool(base) and p not in dict(_flat(base)))
        others = list(alternatives(kind, value))
        strict = is_choice(kind)
        if strict:
            dead += [
                f"{path}={other!r}"
                for other in others
                if not any(has_effect(s, b, path, other, True) for b in bases)
            ]
        elif not _matters(s, bases, path, others):
            dead.append(path)
    expect(
        not dead,
        f"every option must change parameters, computation or raise; these change "
        f"nothing: {', '.join(dead)}. Use or remove them, or add to VARIANTS a setting "
        "under which they matter.",
    )


def model_settings_matter(s: Subject) -> None:
    """The model's dtypes, dropout and initialisation reach the mechanism."""
    changes = {
        "dropout": 0.5,
        "param_dtype": "bfloat16",
        "dtype": "bfloat16",
        "init_std": 0.5,
    }
    dead = [
        name
        for name, value in changes.items()
        if not _differ(s, Subject(s.module, overrides=s.options, dims={name: value}))
    ]
    expect(
        not dead,
        f"settings of the model must reach the mechanism; dims.{', dims.'.join(dead)} "
        "changes nothing.",
    )


def _matters(s: Subject, bases, path: str, others) -> bool:
    if any(has_effect(s, b, path, o, False) for b in bases for o in others):
        return True
    # An option that only VARIANTS know how to set: compare a variant with itself
    # less that option.
    for base in bases:
        flat = dict(_flat(base))
        if path in flat:
            without = nested({k: v for k, v in flat.items() if k != path})
            if _is_refused(s, without):  # The variant needs it.
                return True
            if has_effect(s, without, path, flat[path], False):
                return True
    return False


def _is_refused(s: Subject, base: dict) -> bool:
    try:
        subject(s.module, schema.merge(s.settings.config, base))
    except REFUSALS:
        return True
    return False


def has_effect(s: Subject, base: dict, path: str, value, raising: bool) -> bool:
    """Whether setting `path` to `value` on top of `base` changes anything.

    Args:
        raising: whether a refusal counts as an effect.
    """
    try:
        one = subject(s.module, schema.merge(s.settings.config, base))
        stage(one, "init")
    except REFUSALS:
        return False
    try:
        other = subject(s.module, schema.merge(one.options, nested({path: value})))
        return _differ(one, other)
    except REFUSALS:
        return raising


def _differ(one: Subject, other: Subject) -> bool:
    return any(stage(one, name) != stage(other, name) for name in stages(one))


def stages(s: Subject) -> Iterator[str]:
    """Names of the traces of a mechanism, the most telling first."""
    can = s.spec.capabilities
    yield "train"
    yield "init"
    yield from ("state", "step", "prefill") if can.decode else ()
    yield "bidirectional" if can.bidirectional and can.causal else "eval"
    yield "eval"
    yield from ("cross",) if can.cross else ()
    yield from ("prefix",) if can.prefix else ()
    yield from ("streams",) if hasattr(s.module, "streams") else ()
    yield from ("carried",) if hasattr(s.module, "carried") else ()


def stage(s: Subject, name: str) -> str:
    """The text of one trace, made once a Subject."""
    if not hasattr(s, "stages"):
        s.stages = {}
    if name not in s.stages:
        s.stages[name] = _trace(s, name)
    return s.stages[name]


def _trace(s: Subject, name: str) -> str:
    if name == "init":
        return _text(s.init, np.int32(1))
    if name == "streams":
        return _text(lambda: s.module.streams(s.config, s.dims, jax.random.key(0)))
    if name == "carried":
        return repr(s.declared_carried())
    if name == "state":
        return _text(lambda: s.new_state(s.build(), 2, 24))
    arrays = jax.eval_shape(lambda: s.init(0))
    x, ctx = samples.sample(s)
    if name in ("step", "prefill"):
        part = samples.cut(
            x, ctx.replace(causal=True), slice(0, 1 if name == "step" else None)
        )
        state = jax.eval_shape(lambda: s.new_state(s.build(), 2, 24))
        return _text(lambda a, x, c, t: s.call_step(a, x, t, c), arrays, *part, state)
    changes = {
        "train": {"train": True},
        "bidirectional": {"causal": False},
        "prefix": {"prefix_len": np.full(2, 3, np.int32), "causal": True},
    }
    ctx = ctx.replace(**changes.get(name, {}))
    if name == "cross":
        ctx = samples.with_memory(s, ctx)
    return _text(s.call, arrays, x, ctx)


def _text(function: Callable, *args) -> str:
    """The trace of a function with its constants, without what nothing reads."""
    closed = jax.make_jaxpr(function)(*args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    used = {id(v) for v in live.constvars}
    constants = [
        np.asarray(c).tobytes()
        for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)
        if id(v) in used and not jax.dtypes.issubdtype(c.dtype, jax.dtypes.prng_key)
    ]
    return re.sub(r" at 0x[0-9a-f]+", "", str(live)) + repr(constants)


def leaves(cls: type, resolved: dict, head: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, type, value) of every option, nested dataclasses opened."""
    for name, kind in schema.field_types(cls).items():
        value = resolved[name]
        inner = next((k for k in _arms(kind) if dataclasses.is_dataclass(k)), None)
        if inner is not None and isinstance(value, dict):
            yield from leaves(inner, value, f"{head}{name}.")
        else:
            yield f"{head}{name}", kind, value


def is_choice(kind) -> bool:
    """Whether a type has a fixed set of values: bool or Literal."""
    arms = _arms(kind)
    return all(a is bool or typing.get_origin(a) is typing.Literal for a in arms)


def alternatives(kind, value) -> Iterator[Any]:
    """Other values that an option of this type may take."""
    for arm in _arms(kind):
        if arm is bool:
            yield from (v for v in (True, False) if v is not value)
        elif typing.get_origin(arm) is typing.Literal:
            yield from (v for v in typing.get_args(arm) if v != value)
        elif arm is int:
            base = value if isinstance(value, int) else 2
            yield from (base + 1, base * 2, base - 1, max(base // 2, 1))
        elif arm is float:
            base = float(value) if isinstance(value, int | float) else 0.5
            yield from (base * 0.5 + 0.1, base + 1.0, -base)
        elif dataclasses.is_dataclass(arm) and value is None:
            inner = schema.resolve(arm, {})
            for path, own, default in leaves(arm, inner):
                yield from (nested({path: v}) for v in alternatives(own, default))
        elif arm is type(None) and value is not None:
            yield None


def _arms(kind) -> tuple:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _flat(mapping: dict, head: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{head}{name}.")
        else:
            yield f"{head}{name}", value
