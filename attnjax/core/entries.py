"""A mechanism's catalog entry as plain JSON values, read from its own file."""

import dataclasses
import types
from typing import Any

from attnjax.core import discovery
from attnjax.core.schema import build, field_docs, field_types, resolve, to_json
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.core.values import type_name

# Sizes at which entries tell their parameters, decode state and FLOPs.
EXAMPLE_DIMS = MixerDims(
    embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64, num_layers=12, max_len=1024
)


def entries() -> list[dict[str, Any]]:
    """The entry of every mechanism of the package, by name."""
    return [entry(discovery.find(name)) for name in discovery.names()]


def entry(module: types.ModuleType) -> dict[str, Any]:
    """The entry of one checked mechanism.

    Returns:
        Everything in its SPEC that is not a function, `kind` ("mixer", or "preset"
        of Attention), `config` (one {name, type, default, doc} a field) and
        `example` (sizes of one layer at EXAMPLE_DIMS; None if its Config has
        required fields).
    """
    spec: MixerSpec = module.SPEC
    told = {
        field.name: to_json(getattr(spec, field.name))
        for field in dataclasses.fields(spec)
        if not callable(getattr(spec, field.name))
    }
    return {
        **told,
        "kind": "preset" if hasattr(module, "preset") else "mixer",
        "config": options(module.Config),
        "example": _example(module),
    }


def options(config: type) -> list[dict[str, Any]]:
    """A Config's fields with type, default and doc, in order."""
    kinds, docs = field_types(config), field_docs(config)
    rows = []
    for field in dataclasses.fields(config):
        row = {
            "name": field.name,
            "type": type_name(kinds[field.name]),
            "required": _is_required(field),
            "default": None if _is_required(field) else to_json(_default(field)),
            "doc": docs.get(field.name, ""),
        }
        rows.append(row)
    return rows


def capability_words(capabilities: Capabilities | dict) -> list[str]:
    """What a mechanism can do, as words: ["causal", "cross", "grid 1-2"]."""
    told = capabilities if isinstance(capabilities, dict) else to_json(capabilities)
    words = [name for name, value in told.items() if value is True]
    if told["grid"]:
        words.append("grid " + "-".join(f"{rank}" for rank in told["grid"]))
    return [word.replace("_", " ") for word in words]


def decode_words(decode: Decode | dict) -> str:
    """How decoding relates to the full pass: "exact", "exact with a=1", "differs"."""
    told = decode if isinstance(decode, dict) else to_json(decode)
    if not told["exact"]:
        return f"differs: {told['reason']}" if told["reason"] else "differs"
    settings = ", ".join(f"{name}={value}" for name, value in told["options"])
    return f"exact with {settings}" if settings else "exact"


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _example(module: types.ModuleType) -> dict[str, Any] | None:
    if any(_is_required(field) for field in dataclasses.fields(module.Config)):
        return None
    spec, dims = module.SPEC, EXAMPLE_DIMS
    config = build(module.Config, resolve(module.Config, {}))
    return {
        "embed_dim": dims.embed_dim,
        "num_heads": dims.num_heads,
        "seq_len": dims.max_len,
        "parameters": int(spec.parameter_count(config, dims)),
        "state": int(spec.state_size(config, dims, dims.max_len)),
        "flops": float(spec.flops(config, dims, dims.max_len)),
    }
