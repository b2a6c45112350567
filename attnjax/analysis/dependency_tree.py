"""The dependency trees of a trained vision transformer, as numbers and as a picture.

python -m attnjax.analysis.dependency_tree --workdir RUN --out FILE.png

In a layer of `dependencyvit` token i, a child, sends sum_h R[h, j, i] of its message
to token j; where most goes is its parent. Nothing makes a tree of these edges: beside
those that lead to the root there may be circles, and tokens that are their own parents.

Source: Ding et al., "Visual Dependency Transformers", arXiv 2304.03282, for the mask
and the parents; of the root the paper says that it mostly receives, which is taken here
as what a token gets from others less what it sends to them.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.cli import run_main
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line

MECHANISM = "dependencyvit"
NO_PARENT = -1
MAX_IMAGES = 32
SIDE = 2.4  # inches of a panel
PALEST = 0.55  # how bright the darkest of an image is shown
DIM = 0.4  # how bright what was left out is
ROOT_COLOUR = "#D55E00"  # of Okabe and Ito's palette


@dataclasses.dataclass(frozen=True)
class Trees:
    """What the tokens of some images send one another in one layer.

    Attributes:
        layer: its number, from 0.
        mask: [B, T, T], what parents (rows) receive from children (columns), summed
            over heads.
    """

    layer: int
    mask: np.ndarray

    @property
    def message(self) -> np.ndarray:
        """What each token sends, [B, T]: its m, or 0 where it was left out."""
        return self.mask.sum(-2)

    @property
    def parents(self) -> np.ndarray:
        """int [B, T], see `parents`."""
        return parents(self.mask)

    @property
    def roots(self) -> np.ndarray:
        """int [B], see `roots`."""
        return roots(self.mask)


def parents(mask: np.ndarray) -> np.ndarray:
    """The parent of each token: int [..., T], the row with the largest entry of its
    column; NO_PARENT where it sends nothing.

    Args:
        mask: [..., T, T], parents in rows and children in columns.
    """
    mask = np.asarray(mask)
    return np.where(mask.any(-2), mask.argmax(-2), NO_PARENT)


def roots(mask: np.ndarray) -> np.ndarray:
    """The token that mostly receives, int [...]: the largest difference of what it gets
    from other tokens and what it sends to them. Arguments of `parents`."""
    mask = np.asarray(mask)
    # What it sends itself is in both sums.
    return (mask.sum(-1) - mask.sum(-2)).argmax(-1)


def leads_to_root(parents: np.ndarray, root: int) -> np.ndarray:
    """Bool [T]: from which tokens a chain of parents ends at the root.

    Args:
        parents: int [T], of one image; that of the root is not looked at.
    """
    at = np.arange(len(parents))
    step = np.append(parents, NO_PARENT)  # From nowhere one gets nowhere.
    step[root] = root
    for _ in parents:
        at = step[at]
    return at == root


# ---- of a run


def trees_of(
    model: Any, params: dict, buffers: dict, images: np.ndarray, *, layers=None
) -> list[Trees]:
    """The trees of images in each layer of reversed attention.

    Args:
        model: a `models.vit.ViT`.
        params, buffers: its arrays.
        images: [B, H, W, Ch], normalised as those of its training.
        layers: which layers, from 0; None: all that are of the mechanism.

    Raises:
        UserError: for layers of other mechanisms, or a model without any of it.
    """
    own = [
        layer
        for layer, name in enumerate(model.names)
        if model.choices[name].spec.name == MECHANISM
    ]
    if not own:
        raise UserError(
            f"dependency_tree: needs layers of {MECHANISM}; got a model of "
            f"{', '.join(sorted(set(model.names)))}. Train one with "
            f"--config.model.layers={MECHANISM}"
        )
    chosen = own if layers is None else sorted(set(layers))
    wrong = sorted(set(chosen) - set(own))
    if wrong or not chosen:
        raise UserError(
            f"dependency_tree: layers must be of {MECHANISM}, which are {own}; got "
            f"{list(layers)}."
        )
    hook = Hook("sent", "weights", layers=tuple(chosen))
    masks = _masks(model, hook, params, buffers, jnp.asarray(images))
    masks = jax.device_get(masks)
    return [Trees(layer, masks[layer]) for layer in chosen]


@partial(jax.jit, static_argnums=(0, 1))
def _masks(model, hook: Hook, params, buffers, images) -> dict[int, jax.Array]:
    ctx = model.context(batch=len(images)).replace(hooks=(hook,))
    _, out = model.hidden(params, buffers, images, ctx)
    return {layer: jnp.sum(r[hook.name], axis=1) for layer, r in out.records.items()}


def summary(trees: Trees) -> dict[str, float]:
    """What a picture does not say in numbers, as means over tokens and images.

    Returns:
        "message", what a token sends; "own_parent", the share of sending tokens that
        are their own parents; "to_root", that of those whose parents lead to the root.
    """
    found, root = trees.parents, trees.roots
    sends = found != NO_PARENT
    leads = [leads_to_root(p, r) for p, r in zip(found, root, strict=True)]
    return {
        "message": float(trees.message[sends].mean()),
        "own_parent": float((found == np.arange(found.shape[1]))[sends].mean()),
        "to_root": float(np.stack(leads)[sends].mean()),
    }


# ---- the picture


@dataclasses.dataclass(frozen=True)
class Board:
    """Where tokens lie on an image: patches at their centres, in units of a patch, and
    those in front of them in a row above.

    Attributes:
        grid: rows and columns of patches.
        extra: tokens in front.
    """

    grid: tuple[int, int]
    extra: int = 0

    def places(self) -> np.ndarray:
        """[T, 2], x to the right and y down."""
        rows, columns = self.grid
        y, x = np.divmod(np.arange(rows * columns), columns)
        patches = np.stack([x + 0.5, y + 0.5], -1)
        front = np.stack([np.arange(self.extra) + 0.5, np.full(self.extra, -0.5)], -1)
        return np.concatenate([front, patches])


def draw(pictures: np.ndarray, layers: list[Trees], board: Board, path: Path) -> None:
    """A row an image and a column a layer, with an arrow from each child to its parent.

    An arrow has the colour of what the child sends, by the scale below its column, and
    is as wide as the share of it that goes to that parent. A ring is a token that is
    its own parent, the star the root; patches that were left out are dark.

    Args:
        pictures: uint8 [B, H, W, Ch].
        layers: of the same images.
        path: the file, of a kind that Matplotlib writes.
    """
    from matplotlib.figure import Figure

    count, size = len(pictures), (SIDE * len(layers), SIDE * len(pictures) + 0.6)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    panels = figure.subplots(count, len(layers), squeeze=False)
    for column, trees in enumerate(layers):
        scale = _scale(trees)
        panels[0, column].set_title(f"layer {trees.layer}", fontsize=9)
        for row in range(count):
            _panel(panels[row, column], pictures[row], trees, row, board, scale)
        bar = figure.colorbar(
            scale, ax=panels[:, column], location="bottom", shrink=0.8, aspect=25
        )
        bar.set_label("message m", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.savefig(path)


def _scale(trees: Trees):
    """Colours from the least to the greatest message that is sent, darker ones for
    more; none as pale as the image."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(colormaps["viridis_r"](np.linspace(0.15, 1.0, 256)))
    sent = trees.message[trees.parents != NO_PARENT]
    return ScalarMappable(Normalize(sent.min(), sent.max()), colours)


def _panel(axes, picture, trees: Trees, row: int, board: Board, scale) -> None:
    """One image in one layer."""
    rows, columns = board.grid
    places, message = board.places(), trees.message[row]
    found, root = trees.parents[row], trees.roots[row]
    _show(axes, picture, found[board.extra :].reshape(rows, columns), board)
    for child, parent in enumerate(found):
        if parent == NO_PARENT:
            continue
        colour = scale.to_rgba(message[child])
        width = 0.4 + 2.2 * trees.mask[row, parent, child] / message[child]
        if parent == child:
            axes.plot(*places[child], "o", mfc="none", mec=colour, mew=width, ms=7)
            continue
        bend = {"connectionstyle": "arc3,rad=0.12", "shrinkA": 1, "shrinkB": 3}
        look = {"arrowstyle": "-|>", "mutation_scale": 7, "lw": width, "color": colour}
        ends = dict(xy=places[parent], xytext=places[child])
        axes.annotate("", **ends, arrowprops=bend | look)
    star = dict(marker="*", ms=11, mfc=ROOT_COLOUR, mec="white", mew=0.7)
    axes.plot(*places[root], **star)


def _show(axes, picture, parents_on_grid, board: Board) -> None:
    """The image, pale, with lines between patches; what was left out is dark."""
    (rows, columns), height = board.grid, len(picture)
    shown = picture.repeat(3, -1) if picture.shape[-1] == 1 else picture[..., :3]
    side = height // rows
    left = (parents_on_grid != NO_PARENT).repeat(side, 0).repeat(side, 1)
    shown = (PALEST + (1 - PALEST) * shown / 255.0) * np.where(left, 1.0, DIM)[
        ..., None
    ]
    axes.imshow(shown, extent=(0, columns, rows, 0), interpolation="nearest")
    for at in range(1, columns):
        axes.axvline(at, color="white", lw=0.4, alpha=0.5)
    for at in range(1, rows):
        axes.axhline(at, color="white", lw=0.4, alpha=0.5)
    axes.set_xlim(0, max(columns, board.extra))
    axes.set_ylim(rows, -1 if board.extra else 0)
    axes.set_axis_off()


# ---- the command line


@dataclasses.dataclass(frozen=True)
class Flags:
    """Draw the dependency trees of held-out images: a row an image, a column a layer.

    Attributes:
        workdir: the run directory of a vision transformer with layers of dependencyvit.
        out: the picture, .png or .svg.
        num: images, the first ones of the held-out split.
        layers: which layers, from 0, e.g. 0,3 (none: all of the mechanism).
        step: the checkpoint (none: the newest intact one).
        arrays: an .npz file for masks, parents and roots of each layer (none: the
            picture alone).
    """

    workdir: str
    out: str
    num: int = 4
    layers: tuple[int, ...] | None = None
    step: int | None = None
    arrays: str | None = None


def main(argv: list[str]) -> None:
    """The command line."""
    flags = parse_command_line(
        argv,
        Flags,
        program="attnjax.analysis.dependency_tree",
        config=False,
        overrides=False,
    ).flags
    from attnjax.decoding import pictures
    from attnjax.decoding.run import load_run
    from attnjax.training import disk

    if not 1 <= flags.num <= MAX_IMAGES:
        raise UserError(f"--num: must be from 1 to {MAX_IMAGES}; got {flags.num}.")
    out = disk.ready_out(flags.out, kinds=(".png", ".svg"))
    arrays = flags.arrays and disk.ready_out(flags.arrays, kinds=(".npz",))
    run = load_run(flags.workdir, step=flags.step)
    images, data = _held_out(run, flags.num)
    layers = trees_of(run.model, run.params, run.buffers, images, layers=flags.layers)
    for trees in layers:
        told = (f"{name} {value:.4g}" for name, value in summary(trees).items())
        print(f"layer {trees.layer}: {', '.join(told)}")
    board = Board(run.model.grid, run.model.config.extra_tokens)
    seen = run.model.from_anchor(jnp.asarray(images))
    with disk.disk_errors("--out"):
        draw(pictures.pixels(seen, data), layers, board, out)
    print(f"wrote {out}")
    if arrays:
        with disk.disk_errors("--arrays"):
            np.savez(arrays, **_arrays(layers))
        print(f"wrote {arrays}")


def _held_out(run: Any, num: int) -> tuple[np.ndarray, Any]:
    """The first images of the held-out split of a run's data, and its settings."""
    from attnjax.models.vit import ViT
    from attnjax.training import feeds

    if not isinstance(run.model, ViT):
        raise UserError(
            "dependency_tree: needs a vision transformer; got a run with "
            f"config.model.name={run.config['model']['name']}."
        )
    feed = feeds.make(run.config)
    batch = next(iter(feed.eval_batches(batch_size=num)))
    return batch["image"][batch["weight"] > 0], feed.data


def _arrays(layers: list[Trees]) -> dict[str, np.ndarray]:
    """By name: "mask_<layer>", "parents_<layer>", "roots_<layer>"."""
    names = ("mask", "parents", "roots")
    return {f"{n}_{trees.layer}": getattr(trees, n) for trees in layers for n in names}


if __name__ == "__main__":
    run_main(main)
