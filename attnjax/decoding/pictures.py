"""Images drawn from a denoiser, and the sheets that show them."""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnjax.core.errors import UserError
from attnjax.decoding import denoising, guidance
from attnjax.tasks.denoising import perturbing
from attnjax.training.settings import PERTURB_OPTIONS, DrawConfig

# Images on a sheet are enlarged to at least this many pixels a side.
SHOWN_SIDE = 32
GAP = 2
# Latents are shown from minus this (black) to this (white).
SHOWN_LATENT = 3.0


def check_guidance(model: Any, scale: float) -> None:
    """Raise UserError for guidance of a model that always knew what to draw."""
    if scale != 1.0 and model.null_label is None:
        raise UserError(
            f"guidance: needs a model that was also trained without {model.told}s; got "
            f"guidance={scale:g}, config.model.{model.dropout_option}=0. Train with "
            f"--config.model.{model.dropout_option}=0.1, or use guidance=1."
        )


def check(task: Any, settings: DrawConfig) -> None:
    """Raise UserError for a sampler that a process does not have, or guidance that its
    model has not the parts for."""
    settings.sampler_settings(task.process)
    check_guidance(task.model, settings.guidance)
    if settings.perturb_scale:
        _chosen(task.model, settings.perturb, settings.perturb_heads)


def draw(
    task: Any,
    params: dict,
    buffers: dict,
    labels: jax.Array,
    *,
    settings: DrawConfig,
    mesh: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """float32 images [B, H, W, Ch], normalised as the training data, of labels [B];
    and how often the sampler asked for a prediction, int32.

    Args:
        task: a `tasks.diffusion.Diffusion`.
        params, buffers: its model's arrays.
        labels: int32 [B], or captions [B, M] of a model that reads them; its
            null_label asks for no class or caption.
        settings: how; per_class and classes are passed over.
        mesh: of the devices that hold the arrays; every process gets all images.

    Raises:
        UserError: for a sampler that is not of the process, guidance that the model
            was not trained for, or heads to perturb that it does not have.
    """
    shares = perturbation = None
    if settings.perturb_scale:
        perturbation, pairs = _chosen(
            task.model, settings.perturb, settings.perturb_heads
        )
        shares = perturbation.shares(pairs, settings.perturb_strength)
    arrays = (params, buffers, labels)
    how = {"settings": settings, "perturbation": perturbation, "shares": shares}
    return draw_perturbed(task, *arrays, **how, mesh=mesh)


def draw_perturbed(
    task: Any,
    params: dict,
    buffers: dict,
    labels: jax.Array,
    *,
    settings: DrawConfig,
    perturbation: perturbing.Perturbation | None,
    shares: np.ndarray | None,
    mesh: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`draw` with the heads to perturb as an array: one program for all of its values.

    Args:
        settings: perturb, perturb_strength and perturb_heads are passed over.
        perturbation: the layers where weights are moved, and to what.
        shares: float [layers, heads] as from `perturbation.shares`.
    """
    check_guidance(task.model, settings.guidance)
    key = jax.random.key(settings.seed)
    numbers = {}
    if settings.perturb_scale:
        numbers = {"shares": shares, "weight": settings.perturb_scale}
        if settings.perturb_decay:
            numbers["decay"] = settings.perturb_decay
        scale = 1.0
    else:
        perturbation, scale = None, 0.0
    # What the program does not depend on.
    plain = {
        name: getattr(DrawConfig, name)
        for name in PERTURB_OPTIONS
        if name != "perturb_interval"
    }
    settings = dataclasses.replace(settings, seed=0, perturb_scale=scale, **plain)
    run = _program(task, settings, perturbation, mesh)
    return run(params, buffers, jnp.asarray(labels, jnp.int32), key, numbers)


_chosen = lru_cache(maxsize=64)(
    lambda model, target, heads: perturbing.choose(model, target=target, heads=heads)
)


@lru_cache(maxsize=4)
def _program(task, settings: DrawConfig, perturbation, mesh):
    """The compiled draw, for every evaluation of a run."""
    out = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(partial(_draw, task, settings, perturbation), out_shardings=out)


def _draw(
    task,
    settings: DrawConfig,
    perturbation: perturbing.Perturbation | None,
    params,
    buffers,
    labels,
    prng_key,
    numbers,
):
    """Images of labels, and how many predictions they took; `numbers` of a perturbation
    are its "shares", "weight" and "decay"."""
    model, process = task.model, task.process

    def denoise(x, times, told, shares=None):
        ctx = model.context(batch=len(x))
        if shares is not None:
            ctx = perturbation.context(ctx, shares)
        times = process.embedded(times)
        return model.denoise(params, buffers, x, times, told, ctx)[0]

    told, nothing = _encoded(model, params, labels, settings.guidance)
    push = None
    if perturbation is not None:
        push = guidance.Push(
            partial(denoise, shares=numbers["shares"]),
            numbers["weight"],
            settings.perturb_interval,
            numbers.get("decay", 0.0),
        )
    guided = guidance.guided(
        denoise,
        scale=settings.guidance,
        labels=told,
        null_label=nothing,
        level=process.level,
        rescale=settings.rescale,
        push=push,
    )
    side, channels = model.image_size, model.channels
    return denoising.sample(
        guided,
        process,
        shape=(len(labels), side, side, channels),
        prng_key=prng_key,
        return_evaluations=True,
        **dataclasses.asdict(settings.sampler_settings(process)),
    )


def _encoded(model, params, labels, scale: float):
    """What the model makes of labels, and of none where guidance asks for it: once for
    all steps of a sampler."""
    if scale == 1.0:
        return model.encode(params, labels), None
    nothing = jnp.asarray(model.null_label, labels.dtype)
    rows = model.encode(params, jnp.concatenate([labels, nothing[None]]))
    return jax.tree.map(lambda a: a[:-1], rows), jax.tree.map(lambda a: a[-1:], rows)


def pixels(images: np.ndarray, data: Any) -> np.ndarray:
    """uint8 [B, H, W, Ch] from normalised images, by `config.data`'s mean and std.

    Of latents the first three channels, or of fewer than three the first, each from
    -3 to 3: a picture of where things are, whose colours mean nothing. What is not a
    number is black.
    """
    if data.is_latent:
        kept = np.asarray(images, np.float32)[..., : 3 if images.shape[-1] >= 3 else 1]
        shown = 0.5 + 0.5 * kept / SHOWN_LATENT
        return _bytes(shown)
    shown = np.asarray(images, np.float32) * np.asarray(data.std) + np.asarray(
        data.mean
    )
    return _bytes(shown)


def _bytes(shown: np.ndarray) -> np.ndarray:
    """uint8 of levels in [0, 1]; 0 of what is not a number."""
    return np.clip(np.round(np.nan_to_num(255.0 * shown)), 0, 255).astype(np.uint8)


def sheet(images: np.ndarray, *, columns: int) -> np.ndarray:
    """uint8 images [B, H, W, Ch] in rows of `columns`: [H', W'], or [H', W', 3].

    Small images are enlarged by a whole factor; gaps are white.
    """
    count, height, width, channels = images.shape
    if count % columns:
        raise ValueError(f"sheet: columns={columns} must divide {count} images.")
    scale = max(1, -(-SHOWN_SIDE // min(height, width)))
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gaps = ((0, 0), (0, GAP), (0, GAP), (0, 0))
    large = np.pad(large, gaps, constant_values=255)
    rows = large.reshape(count // columns, columns, *large.shape[1:])
    whole = rows.transpose(0, 2, 1, 3, 4)
    whole = whole.reshape(-1, columns * large.shape[2], channels)[:-GAP, :-GAP]
    return whole[..., 0] if channels == 1 else whole


def sample_sheet(here: Any, state: dict) -> np.ndarray:
    """The picture that an evaluation of a run draws: a class a column."""
    settings: DrawConfig = here.eval.draw
    params = state.get("ema", state["params"])
    classes = min(settings.classes, here.corpus.num_classes)
    labels = np.tile(np.arange(classes), settings.per_class)
    made, _ = draw(
        here.task,
        params,
        state["buffers"],
        here.feed.told(labels),
        settings=settings,
        mesh=here.mesh if here.mesh.size > 1 else None,
    )
    return sheet(pixels(np.asarray(made), here.data), columns=classes)
