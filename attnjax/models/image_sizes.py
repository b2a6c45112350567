"""What models of images share: sizes by name, the grid, and their refusals."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.models import backbone, schedule

Sizes = dict[str, tuple[int, int, int]]

# Positions that are added at the places of one grid, and resampled for another.
ADDED = ("learned", "sincos", "anchored_learned")


def filled(config: Any, sizes: Sizes, *, patch: int, example: str) -> Any:
    """The config with the numbers of its size filled in.

    Args:
        config: has size, embed_dim, num_layers, num_heads, patch_size, layers.
        sizes: name -> C, layers, heads.
        patch: side of a patch where neither size nor patch_size say it.
        example: of a size, for the refusal.

    Raises:
        UserError: for a size of another form.
    """
    names = ("embed_dim", "num_layers", "num_heads", "patch_size")
    values: tuple = (128, None, 4, patch)
    if config.size is not None:
        match = re.fullmatch(r"(\w+)/([1-9]\d*)", config.size)
        if match is None or match[1] not in sizes:
            raise UserError(
                f"config.model.size: must be one of {', '.join(sizes)}, a slash and "
                f"the side of a patch; got {config.size!r}. Example: {example}."
            )
        values = (*sizes[match[1]], int(match[2]))
        if not isinstance(config.layers, str):
            values = (values[0], None, *values[2:])
        elif config.num_layers is None:
            _check_schedule(config, values[1])
    told = {
        name: value
        for name, value in zip(names, values, strict=True)
        if getattr(config, name) is None
    }
    return dataclasses.replace(config, **told)


def _check_schedule(config: Any, depth: int) -> None:
    """Raise UserError where the schedule does not fill the size's layers."""
    own = len(schedule.expand(config.layers, None))
    if depth % own:
        raise UserError(
            f"config.model.layers: a schedule of {own} layers does not fill the "
            f"{depth} of size={config.size}. Set config.model.num_layers to a multiple "
            f"of {own}."
        )


def check_positions(config: Any) -> None:
    """Raise UserError where positions on a grid do not fit the widths."""
    dim = config.embed_dim
    if config.positions == "sincos" and (dim % 4 or dim < 8):
        raise UserError(
            "config.model.embed_dim: must be a multiple of 4, and at least 8, for "
            f"positions=sincos; got {dim}. Change it, or use other positions."
        )
    if config.positions_grid is not None and config.positions not in ADDED:
        raise UserError(
            "config.model.positions_grid: resamples added positions; got "
            f"positions={config.positions}. Leave it at none"
            + (
                ", and see config.model.rope.scaling."
                if config.positions == "rope"
                else "."
            )
        )
    if config.positions == "rope":
        check_rope(config)


def check_rope(config: Any) -> None:
    """Raise UserError where heads are too narrow to be turned along two axes."""
    rope = nn.rope_on_grid(config.rope, (1, 1), 0)
    width = backbone.head_width(config)
    if not rope.rotated_dim(width):
        raise UserError(
            "config.model.head_dim: two axes turn four entries at least; got "
            f"head_dim={width}, rope.fraction={config.rope.fraction}. Raise one of "
            "them, or use other positions."
        )


def check_images(config: Any, image_size: int, channels: int, num_classes: int) -> None:
    """Raise UserError for images that cannot be cut into patches."""
    if image_size < 1 or image_size % config.patch_size:
        divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
        raise UserError(
            "config.model.patch_size: must divide config.data.image_size; got "
            f"patch_size={config.patch_size}, image_size={image_size}. Use one of "
            f"{divisors}."
        )
    check_counts(config, channels=channels, num_classes=num_classes)


def check_counts(config: Any, **counts: int) -> None:
    """Raise UserError for counts of nothing."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(
                f"{config.name}: {name} must be at least 1; got {name}={value}."
            )


def check_batch(model: Any, images: jax.Array, *, resamples: bool = True) -> None:
    """Raise UserError for a batch of images that the model was not made for.

    Args:
        resamples: whether the model can resample added positions.
    """
    wanted = (model.image_size, model.image_size, model.channels)
    if images.ndim == 4 and images.shape[1:] == wanted:
        return
    added = resamples and model.config.positions in ADDED
    raise UserError(
        f"{model.config.name}: images must be [B, H, W, channels] with H = W = "
        f"image_size; got shape {tuple(images.shape)}, image_size={model.image_size}, "
        f"channels={model.channels}. For images of another size build the model for "
        "that size"
        + (
            f", with config.model.positions_grid={model.positions_grid[0]}."
            if added
            else "."
        )
    )


def check_whole_rows(ctx: Context) -> None:
    """Raise UserError where devices share the tokens of a row."""
    if ctx.sequence_form is not None:
        raise UserError(
            "config.mesh.sequence: an image model needs whole rows on each device; "
            "got more than 1. Set it to 1."
        )


def context(model: Any, *, batch: int, prng_key, train: bool, rows) -> Context:
    """The surroundings of `batch` rows of `model.num_tokens` tokens on its grid."""
    places = jnp.arange(model.num_tokens, dtype=jnp.int32)[None]
    return Context(
        positions=jnp.broadcast_to(places, (batch, model.num_tokens)),
        prng_key=prng_key,
        causal=False,
        grid=model.grid,
        extra_tokens=model.dims.prefix_tokens,
        train=train,
        rows=rows,
    )


def stream(model: Any, start: jax.Array, length: int) -> jax.Array:
    """An extra stream [1, length, C] from its start, which must not be token ids."""
    if jnp.issubdtype(start.dtype, jnp.integer):
        raise UserError(
            f"{model.config.name}: an extra stream of tokens needs a table of tokens, "
            "which an image model does not have. Choose another mixer for its layers."
        )
    return start[:, :length].astype(model.dtype)
