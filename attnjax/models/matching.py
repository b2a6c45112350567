"""Equal parameters: the FFN width at which a model has as many as a baseline.

The papers of the softmax side narrow the FFNs of a mechanism that adds parameters, so
that it is compared with a baseline of its own size. All FFNs of a model have one
width, so parameters come in steps of one unit in each of them; what is left over is
told by the run, the plan and the sweep.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from attnjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.model.match`: the baseline of params=match, and the steps of the width.

    The baseline is this model with other mixers, without learned tokens, and with the
    FFN width that `config.model.mlp_dim` gives.

    Attributes:
        layers: its schedule, of catalog names with their default options.
        num_heads: its query heads (none: this model's).
        num_kv_heads: its key/value heads (none: this model's).
        multiple: the adjusted FFN width is a multiple of this. 1 leaves the smallest
            difference; accelerators like 64 or 128.
    """

    layers: str | tuple[str, ...] = "attention"
    num_heads: int | None = None
    num_kv_heads: int | None = None
    multiple: int = 1

    def __post_init__(self):
        for name in ("num_heads", "num_kv_heads", "multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")


@dataclasses.dataclass(frozen=True)
class Matched:
    """A model whose FFN width was adjusted.

    Attributes:
        target: parameters wanted.
        baseline: the schedule that has them, or "" where a number was given.
        parameters: of the model.
        mlp_dim: its FFN width.
        configured_mlp_dim: the width before, which is the baseline's.
    """

    target: int
    baseline: str
    parameters: int
    mlp_dim: int
    configured_mlp_dim: int

    @property
    def difference(self) -> int:
        """Parameters more than wanted."""
        return self.parameters - self.target

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {**dataclasses.asdict(self), "difference": self.difference}

    def line(self) -> str:
        """For people."""
        share = 100 * self.difference / self.target
        told = f" of {self.baseline}" if self.baseline else ""
        return (
            f"FFN width {self.configured_mlp_dim:,} -> {self.mlp_dim:,} for the "
            f"{self.target:,} parameters{told}; {self.difference:+,} ({share:+.2g}%) "
            "is left"
        )


def check(config: Any) -> None:
    """Raise UserError for settings of `config.model.match` that would do nothing."""
    plain = (
        Config() if config.params is None else Config(multiple=config.match.multiple)
    )
    if config.params != "match" and config.match != plain:
        raise UserError(
            "config.model.match: describes the baseline of params=match; got "
            f"params={config.params}, {config.match}. Set config.model.params=match, "
            "or leave it at its defaults."
        )
    if isinstance(config.params, int) and config.params < 1:
        raise UserError(
            f"config.model.params: must be at least 1; got {config.params}."
        )


def baseline_of(config: Any, depth: int) -> Any:
    """The `config.model` of the baseline: `depth` layers of `config.match.layers`.

    Args:
        config: a model's Config with params="match".
    """
    chosen = config.match
    heads = {
        name: getattr(chosen, name)
        for name in ("num_heads", "num_kv_heads")
        if getattr(chosen, name) is not None
    }
    return dataclasses.replace(
        config.without_learned_tokens(),
        layers=chosen.layers,
        num_layers=depth,
        mixers={},
        params=None,
        match=Config(),
        **heads,
    )


def solve(config: Any, *, width: int, depth: int, count: Callable) -> Matched:
    """The width at which a model has the parameters that its config asks for.

    Args:
        config: a model's Config with `params`.
        width: its FFN width as configured.
        depth: layers.
        count: (Config) -> parameters of the model that it describes.

    Raises:
        UserError: where the FFNs cannot make up for the difference.
    """
    own = dataclasses.replace(config, params=None, match=Config())
    have = count(own)
    if config.params == "match":
        chosen = config.match.layers
        target = count(baseline_of(config, depth))
        name = chosen if isinstance(chosen, str) else " ".join(chosen)
    else:
        target, name = config.params, ""
    if width == 0 and target != have:
        raise UserError(
            "config.model.params: equal parameters need FFNs to adjust; got mlp_dim=0 "
            f"and {have:,} parameters, {target:,} wanted. Give config.model.mlp_dim a "
            "width, or set config.model.params=none."
        )
    each = config.mlp_parameters_per_unit()
    step = config.match.multiple
    found = step * round((width + (target - have) / each) / step)
    if found < step and width:
        raise UserError(
            f"config.model.params: {have:,} parameters at mlp_dim={width} are "
            f"{have - target:,} more than the {target:,} wanted, and the FFNs hold "
            f"only {each * width:,}, in steps of {each * step:,}. Raise "
            "config.model.mlp_dim (the baseline's too), or set config.model.params="
            "none."
        )
    if found == width:
        total = have
    else:
        total = count(dataclasses.replace(own, mlp_dim=found))
    return Matched(target, name, total, found, width)
