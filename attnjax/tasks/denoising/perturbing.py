"""Which attention heads a guiding pass perturbs, and how: the options and what they
refuse.

Source: Ahn et al. (perturbed-attention guidance), arXiv 2403.17377; sets of heads and
strengths: arXiv 2506.10978.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError, unknown
from attnjax.mixers.slots import blending

# What the weights of a head are moved to, or along: see `mixers.slots.blending`.
Target = Literal[
    "identity",
    "uniform",
    "largest",
    "mean_query",
    "image_identity",
    "image_gathered",
    "slerp",
    "nlerp",
    "log_linear",
    "temperature",
]
TARGETS = get_args(Target)
TEMPERATURE = "temperature"
# Of rows with text in front of the image.
OF_IMAGE = ("image_identity", "image_gathered")
ALL = "all"


def parse(text: str) -> dict[int, tuple[int, ...] | None] | None:
    """Layer -> its heads of "2:0,1;3:all" (None: all of them); None for "all".

    Raises:
        ValueError: for text of another form, or a layer or head told twice.
    """
    if text.strip() == ALL:
        return None
    chosen = {}
    for part in text.split(";"):
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(all|\d+(?:\s*,\s*\d+)*)\s*", part)
        if found is None:
            raise ValueError(
                "perturb_heads must be 'all' or layers with their heads, as "
                f"'2:0,1;3:all'; got {text!r}."
            )
        layer, heads = int(found[1]), found[2]
        if layer in chosen:
            raise ValueError(f"perturb_heads names layer {layer} twice; got {text!r}.")
        some = None if heads == ALL else tuple(int(h) for h in heads.split(","))
        if some is not None and len(set(some)) < len(some):
            raise ValueError(
                f"perturb_heads names a head of layer {layer} twice; got {text!r}."
            )
        chosen[layer] = some
    return chosen


def check_strength(target: str, strength: float) -> None:
    """Refuse a number that a target cannot have, or with which it does nothing.

    Raises:
        ValueError: for a share u out of (0, 1], or a temperature that is 1 or not
            positive.
    """
    if target != TEMPERATURE:
        if not 0 < strength <= 1:
            raise ValueError(f"perturb_strength must be in (0, 1]; got {strength}.")
    elif not strength > 0:
        raise ValueError(
            "perturb_strength must be positive, as the temperature; got "
            f"{strength}. perturb=largest is its limit at 0."
        )
    elif strength == 1:
        raise ValueError(
            "perturb_strength does nothing at 1, as the temperature; got perturb="
            "temperature, perturb_strength=1. Less is sharper, more is flatter."
        )


def text_of(pairs: Iterable[tuple[int, int]]) -> str:
    """The text that `parse` reads of (layer, head) pairs."""
    layers = {}
    for layer, head in sorted(pairs):
        layers.setdefault(layer, []).append(str(head))
    return ";".join(f"{layer}:{','.join(heads)}" for layer, heads in layers.items())


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """Weights A moved in some layers, by a number of each head: static, hashable.

    The numbers are an array: the share u of A' = (1 - u) A + u P, how far u on a curve
    from A to the identity, or a temperature.

    Attributes:
        target: of `TARGETS`.
        num_layers: of the model.
        sites: (layer, its number of heads H) where weights are moved.
    """

    target: str
    num_layers: int
    sites: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if self.target not in TARGETS:
            raise unknown("perturb", "target", self.target, TARGETS)

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (layer, head) of the sites."""
        return tuple((layer, head) for layer, n in self.sites for head in range(n))

    def shares(self, pairs: Iterable[tuple[int, int]], strength: float) -> np.ndarray:
        """float32 [layers, most heads of a layer]: the number of the pairs, and of the
        others the one that changes nothing.

        Raises:
            UserError: for a pair that is not of the sites, or no pair.
        """
        found, known = self.unmoved(), self.pairs()
        pairs = tuple(pairs)
        if not pairs:
            raise UserError("perturb: at least one head must be chosen; got none.")
        for layer, head in pairs:
            if (layer, head) not in known:
                raise UserError(
                    "perturb: heads must be among those of the layers "
                    f"{dict(self.sites)} (layer: heads); got layer {layer}, head "
                    f"{head}. Heads count from 0 in their layer."
                )
            found[layer, head] = strength
        return found

    def unmoved(self) -> np.ndarray:
        """The shares with which no head is moved."""
        most = max(n for _, n in self.sites)
        fill = blending.neutral(self.action)
        return np.full((self.num_layers, most), fill, np.float32)

    @property
    def action(self) -> str:
        """Of the hooks."""
        return blending.PREFIX + self.target

    def context(self, ctx: Context, shares: jax.Array) -> Context:
        """`ctx` with the hooks that move the weights by `shares`."""
        hooks, operands = [], {}
        for count in sorted({n for _, n in self.sites}):
            name = f"perturb_{count}_heads"
            layers = tuple(layer for layer, n in self.sites if n == count)
            hooks.append(Hook(name, "weights", layers=layers, action=self.action))
            operands[name] = shares[:, :count]
        return ctx.replace(
            hooks=(*ctx.hooks, *hooks), interventions=ctx.interventions | operands
        )


def choose(
    model: Any, *, target: str, heads: str
) -> tuple[Perturbation, tuple[tuple[int, int], ...]]:
    """What a text asks of a model, and the (layer, head) pairs that it names.

    The layers are asked what they have by an abstract trace; nothing is computed.

    Args:
        model: a `models.dit.DiT` or `models.mmdit.MMDiT`.
        target: of `TARGETS`.
        heads: as `parse` reads it.

    Raises:
        UserError: for a text of another form, layers or heads that are not there,
            mechanisms whose weights cannot be moved, by their names, and a target of
            rows with text of a model without.
    """
    if target in OF_IMAGE and not model.context(batch=1).extra_tokens:
        raise UserError(
            f"perturb: {target} is for text and image in one row; got target={target}, "
            f"config.model.name={model.config.name}. Use identity."
        )
    try:
        chosen = parse(heads)
    except ValueError as error:
        raise UserError(f"perturb: {error}") from error
    depth = len(model.names)
    layers = tuple(range(depth)) if chosen is None else tuple(sorted(chosen))
    for layer in layers:
        if layer >= depth:
            raise UserError(
                f"perturb: layers must be in 0..{depth - 1}; got layer {layer} in "
                f"perturb_heads={heads!r}."
            )
    counts = heads_of(model, layers)
    made = Perturbation(target, depth, tuple(counts.items()))
    named = {
        layer: range(n) if chosen is None or chosen[layer] is None else chosen[layer]
        for layer, n in counts.items()
    }
    pairs = tuple((layer, head) for layer, some in named.items() for head in some)
    shares = made.shares(pairs, 1.0)
    _trace(model, lambda ctx: made.context(ctx, jnp.asarray(shares)))
    return made, pairs


def heads_of(model: Any, layers: Iterable[int]) -> dict[int, int]:
    """Layer -> how many heads its attention weights have.

    Raises:
        UserError: where a layer's mechanism has no weights to read, by its name.
    """
    seen = Hook("weights", "weights", layers=tuple(layers))
    out = _trace(model, lambda ctx: ctx.replace(hooks=(seen,)))
    counts = {}
    for layer in seen.layers:
        shape = out.records[layer]["weights"].shape
        if len(shape) != 4:
            raise UserError(
                f"perturb: layer {layer} ({model.names[layer]}) has no weights of "
                f"heads over tokens, [B, H, T, T]; its 'weights' have shape={shape}. "
                "Name other layers in perturb_heads."
            )
        counts[layer] = shape[1]
    return counts


def _trace(model: Any, change) -> Any:
    """What the layers of a denoiser report with another context, abstractly."""
    side = model.image_size
    arrays = jax.eval_shape(model.init, 0)
    inputs = (
        jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, *model.told_shape), jnp.int32),
    )

    def call(arrays, inputs):
        ctx = change(model.context(batch=1))
        return model.predict(*arrays, *inputs, ctx)[1]

    return jax.eval_shape(call, arrays, inputs)
