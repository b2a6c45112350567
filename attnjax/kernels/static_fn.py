"""The rule for user functions in a static spec."""

import dataclasses
import types
from typing import Any

import jax

RULE = (
    "use a module-level function or a frozen dataclass with __call__, and pass every "
    "array as an operand: a fresh function retraces at each call, and an array it "
    "captures would have no gradient"
)


def check_static_fn(owner: str, fn: Any) -> None:
    """Refuse a function that cannot live in a static spec.

    Accepted: a function defined at module level (a lambda there too) and an instance
    of a frozen dataclass with `__call__` whose fields are hashable. Refused: local
    functions and lambdas, closures, bound methods, `functools.partial`, and anything
    that holds an array.

    Raises:
        ValueError: with the rule and what was found.
    """
    if isinstance(fn, types.FunctionType):
        problem = _problem_of_function(fn)
    elif dataclasses.is_dataclass(fn) and not isinstance(fn, type):
        problem = _problem_of_dataclass(fn)
    else:
        problem = f"{type(fn).__name__} {fn!r}"
    if problem:
        raise ValueError(f"{owner}: {RULE}; got fn={problem}.")


def _problem_of_function(fn: types.FunctionType) -> str | None:
    if fn.__closure__:
        held = ", ".join(fn.__code__.co_freevars)
        return f"{fn.__qualname__}, which captures {held}"
    if "<locals>" in fn.__qualname__:
        return f"{fn.__qualname__}, which is local"
    defaults = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    if any(isinstance(value, jax.Array) for value in defaults):
        return f"{fn.__qualname__}, which has an array as a default argument"
    return None


def _problem_of_dataclass(fn: Any) -> str | None:
    name = type(fn).__name__
    if not callable(fn):
        return f"{name}, which has no __call__"
    if not type(fn).__dataclass_params__.frozen:
        return f"{name}, which is not frozen"
    for field in dataclasses.fields(fn):
        value = getattr(fn, field.name)
        try:
            hash(value)
        except TypeError:
            kind = type(value).__name__
            return f"{name}, whose field {field.name} ({kind}) cannot be hashed"
    return None
