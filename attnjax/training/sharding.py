"""The device mesh, and where each array lies on it.

Parameters get logical axes from a table by path; `config.mesh.rules` maps logical
axes to mesh axes.
"""

import dataclasses
import math
import re
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.core.errors import UserError, unknown
from attnjax.models.layout import path_of
from attnjax.training.hosts import host_rows

AXES = ("data", "fsdp", "tensor", "sequence")

# Parameter path -> logical axes of one layer's array; the first match counts. Paths
# of stacked layers get "layers" put in front.
LOGICAL_AXES = (
    (r"token_embedding/table$", ("vocab", "embed")),
    (r"(position_embedding|prefix_tokens)/table$", (None, "embed")),
    (r"(class_token|registers|classes)/table$", (None, "embed")),
    (r"time/hidden/kernel$", (None, "embed")),
    (r"(time/out|modulation/linear)/kernel$", ("embed", None)),
    (r"(context|pooled/hidden)/kernel$", (None, "embed")),
    (r"pooled/out/kernel$", ("embed", None)),
    (r"(patches|(stem|downsampling)/\w+)/kernel$", (None, "embed")),
    (r"mbconv\w*/(expand|excite)/kernel$", ("embed", "mlp")),
    (r"mbconv\w*/(project|squeeze)/kernel$", ("mlp", "embed")),
    (r"mbconv\w*/shortcut/kernel$", (None, "embed")),
    (r"mbconv\w*/depthwise/conv_kernel$", (None, "mlp")),
    (r"pool/query$", (None, "embed")),
    (r"(pool/value|head_hidden)/kernel$", ("embed", None)),
    (r"head/kernel$", ("embed", "vocab")),
    (r"mlp/(up|gate)/kernel$", ("embed", "mlp")),
    (r"mlp/(up|gate)/bias$", ("mlp",)),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"mixer/out/kernel$", ("heads", "embed")),
    (r"mixer/(query|key|value)/bias$", ("heads",)),
    (r"mixer/.*kernel$", ("embed", "heads")),
)

# Parameters outside of the layers that lie by their axes; others are on every device.
ENDS = (
    *("token_embedding", "position_embedding", "head"),
    *("patches", "class_token", "registers", "pool", "head_hidden"),
    *("stem", "downsampling", "time", "classes", "final_modulation"),
    *("text_encoder", "context", "pooled"),
)

RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.mesh`: sizes of the mesh axes; one may be -1, what is left.

    Attributes:
        data: copies of the model that share the batch.
        fsdp: devices that share the batch and split the parameters.
        tensor: devices that split heads, MLP width and vocabulary.
        sequence: devices that share the tokens of each row, for the layers whose
            tokens meet in softmax attention alone.
        sequence_form: how they do it: "all_to_all" (in attention each has some heads
            of all tokens), "ring" (keys go round), or "auto": the first of these that
            the layers take.
        rules: changes to the map from logical axes to mesh axes, e.g.
            {"vocab": []}.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    sequence_form: Literal["auto", "ring", "all_to_all"] = "auto"
    rules: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_mesh(config: Config, devices=None) -> Mesh:
    """The mesh over all devices.

    Raises:
        UserError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
        raise UserError(
            f"config.mesh: sizes must be positive and at most one -1; got {text}."
        )
    if free:
        if len(devices) % fixed:
            raise UserError(
                f"config.mesh: {fixed} must divide the {len(devices)} devices; got "
                f"{text}."
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"config.mesh: sizes must multiply to the {len(devices)} devices; got "
            f"{text}. Set one of them to -1."
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(
        np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4
    )


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise UserError unless the batch splits over micro-batches and the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % (accumulate * shards):
        unit = accumulate * shards
        above = unit * max(1, math.ceil(batch_size / unit))
        raise UserError(
            "config.train.batch_size: must be a multiple of accumulate x data x fsdp = "
            f"{accumulate} x {mesh.shape['data']} x {mesh.shape['fsdp']} = {unit}; got "
            f"batch_size={batch_size}. Use {above}, or change config.mesh."
        )


def resolve_rules(changes: dict) -> dict[str, tuple[str, ...]]:
    """The rules in force: `RULES` with the config's changes."""
    rules = dict(RULES)
    for logical, axes in changes.items():
        if logical not in RULES:
            raise unknown("config.mesh.rules", "logical axis", logical, RULES)
        axes = (axes,) if isinstance(axes, str) else axes
        if not isinstance(axes, list | tuple | None):
            raise UserError(
                f"config.mesh.rules.{logical}: must be a list of mesh axes; got "
                f"{axes!r}. Example: [fsdp]; [] splits nothing."
            )
        axes = tuple(axes or ())
        for axis in axes:
            if axis not in AXES:
                raise unknown(f"config.mesh.rules.{logical}", "mesh axis", axis, AXES)
        rules[logical] = axes
    return rules


def logical_axes(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    """The logical axes of the parameter at `path`."""
    is_stacked = path[0] == "layers"
    own = ndim - is_stacked
    text = "/".join(path)
    for pattern, axes in LOGICAL_AXES:
        if len(axes) == own and re.search(pattern, text):
            return ("layers", *axes) if is_stacked else axes
    return (("layers",) if is_stacked else ()) + (None,) * own


def param_spec(path, shape, mesh: Mesh, rules) -> P:
    """The PartitionSpec of a parameter; an axis that does not divide is left whole."""
    spec, used = [], set()
    for size, logical in zip(shape, logical_axes(path, len(shape)), strict=True):
        axes = tuple(
            a for a in rules.get(logical, ()) if a not in used and mesh.shape[a] > 1
        )
        if axes and size % math.prod(mesh.shape[a] for a in axes) == 0:
            used.update(axes)
            spec.append(axes if len(axes) > 1 else axes[0])
        else:
            spec.append(None)
    return P(*spec)


def shardings(tree, mesh: Mesh, rules) -> Any:
    """A NamedSharding for every array of a state tree.

    Arrays of the optimizer and averages that mirror parameters are found by the tail
    of their path and placed like them; everything else is on every device.
    """

    def place(key_path, leaf):
        path = path_of(key_path)
        for start, key in enumerate(path):
            inner = path[start:]
            known = key == "layers" and len(inner) > 3
            known = known or key in ENDS
            if known and leaf.ndim:
                return NamedSharding(mesh, param_spec(inner, leaf.shape, mesh, rules))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh, *, leading: int = 1) -> NamedSharding:
    """Rows over data and fsdp, after `leading` whole axes (dispatch, micro-batch);
    their tokens over sequence."""
    tokens = ("sequence",) if mesh.shape["sequence"] > 1 else ()
    return NamedSharding(mesh, P(*(None,) * leading, ("data", "fsdp"), *tokens))


def host_rows_of(mesh: Mesh, batch_size: int) -> slice:
    """The rows of arrays [B, ...] that lie on this host's devices."""
    place = NamedSharding(mesh, P(("data", "fsdp")))
    return host_rows(batch_size, place) or slice(0, batch_size)


def host_tokens_of(mesh: Mesh, seq_len: int) -> slice:
    """The tokens of arrays [B, T] that lie on this host's devices."""
    return host_rows(seq_len, NamedSharding(mesh, P("sequence"))) or slice(0, seq_len)
