"""Facts of attention from an anchor (arXiv 2306.07470)."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from grid_layers import applied, by_hand, close, heads, made, out, wide
from grid_layers import tokens as tokens_of

from attnjax import nn
from attnjax.core import schema
from attnjax.core.context import Context, Hook, MixerOut
from attnjax.core.errors import UserError
from attnjax.mixers import attention, shift_equivariance
from attnjax.models import pyramid, vit
from attnjax.models.block import Block, BlockDims

GRID, D = (6, 4), 6
LAYERS = {
    "local": {"window": (3, 2)},
    "global": {"part": "global", "stride": (2, 4)},
}


def layer(options, grid=GRID, **dims):
    return made(shift_equivariance, grid, options, **dims)


def shifted(x, grid, extra=0):
    """One row in every circular shift of its grid, [prod(grid), T, C]."""
    first, image = x[:1, :extra], x[:1, extra:].reshape(1, *grid, -1)
    axes = tuple(range(1, 1 + len(grid)))
    rows = [np.roll(image, s, axes) for s in np.ndindex(*grid)]
    grids = np.concatenate(rows).reshape(len(rows), -1, x.shape[-1])
    return np.concatenate([np.repeat(first, len(rows), 0), grids], axis=1)


def on_every_shift(s, *, extra=0, **changes):
    """y on all shifts of one row, and all shifts of its y."""
    x, ctx = tokens_of(s, extra=extra, batch=int(np.prod(s.dims.grid)), **changes)
    y = s.y(shifted(x, s.dims.grid, extra), ctx)
    return y, shifted(y, s.dims.grid, extra)


CASES = {
    "local, rotary": (GRID, LAYERS["local"] | {"positions": "rope"}, 0),
    "global, behind two tokens": (GRID, LAYERS["global"], 2),
    "local, in a line behind a token": ((6,), {"window": 3}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_shift_of_the_input_is_the_same_shift_of_the_output(case):
    grid, options, extra = CASES[case]
    y, wanted = on_every_shift(layer(options, grid), extra=extra)
    assert y.std() > 0.1
    close(y, wanted)


@pytest.mark.parametrize("part", LAYERS)
def test_without_an_anchor_only_shifts_by_whole_windows_are(part):
    plain = layer({**LAYERS[part], "anchor": False})
    y, wanted = on_every_shift(plain)
    stride = shift_equivariance.stride_of(plain.config, GRID)
    whole = np.array([not (np.array(s) % stride).any() for s in np.ndindex(*GRID)])
    close(y[whole], wanted[whole])
    assert np.abs(y - wanted).max((1, 2))[~whole].min() > 1e-2


@pytest.mark.parametrize("part", LAYERS)
def test_on_an_anchored_grid_the_plain_layer_is_equivariant_up_to_whole_windows(part):
    """Nothing is turned back: rows differ by whole windows before and after."""
    plain = layer({**LAYERS[part], "anchor": False})
    stride = shift_equivariance.stride_of(plain.config, GRID)
    x, ctx = tokens_of(plain, batch=24)
    x = shifted(x, GRID).reshape(24, *GRID, -1)
    x, start = (np.asarray(a) for a in nn.anchored(x, stride))
    y = plain.y(x.reshape(24, 24, -1), ctx).reshape(24, *GRID, -1)
    assert len(np.unique(start, axis=0)) == np.prod(stride)
    for row, shift in enumerate(np.ndindex(*GRID)):
        steps = start[0] + shift - start[row]
        assert not (steps % stride).any()
        close(y[row], np.roll(y[0], steps, (0, 1)))


@pytest.mark.parametrize("part", LAYERS)
def test_layer_and_reference_are_anchored_by_the_residual_stream(part):
    own, plain = (layer({**LAYERS[part], "anchor": on}) for on in (True, False))
    x, ctx = tokens_of(own)
    residual = np.random.default_rng(3).normal(size=x.shape).astype(x.dtype)
    x, told_by = (a.reshape(2, *GRID, -1) for a in (x, residual))
    stride = shift_equivariance.stride_of(own.config, GRID)
    starts = [np.asarray(nn.anchor_of(a, stride)) for a in (x, told_by)]
    assert (starts[0] != starts[1]).any() and starts[1].any()

    def mix(image):
        one = ctx.replace(positions=ctx.positions[:1], embeddings=None)
        y, _ = plain.forward(own.arrays, image.reshape(1, 24, -1), one)
        return y.reshape(1, *GRID, -1)

    wanted = shift_equivariance.reference(x, told_by, mix, stride=stride)
    y = own.y(x.reshape(2, 24, -1), ctx.replace(residual=residual))
    close(y, wanted.reshape(2, 24, -1))


def test_keys_and_values_are_made_of_cells_and_of_the_tokens_before_them():
    extra = 2
    s = layer({**LAYERS["global"], "anchor": False}, use_bias=True, num_kv_heads=3)
    x, ctx = tokens_of(s, extra=extra)
    params = wide(s.arrays[0])["global"]
    image = x[:, extra:].reshape(2, *GRID, -1)
    # A cell is as wide as the grid.
    cells = [image[:, 2 * i : 2 * i + 2].reshape(2, -1) for i in range(3)]
    cells = applied(params["cell"], np.stack(cells, axis=1))
    scale = params["cell_norm"]["scale"]
    cells = cells / np.sqrt((cells**2).mean(-1, keepdims=True) + 1e-6) * scale
    query = heads(params, x, D)[0]
    _, key, value = heads(params, np.concatenate([x[:, :extra], cells], 1), D)
    found = by_hand((query, key, value), lambda t: list(range(extra + 3)))
    close(s.y(x, ctx), out(params, found))


def test_windows_or_cells_of_the_whole_grid_or_of_one_place_are_full_attention():
    full = made(attention, GRID, head_dim=D, num_kv_heads=6)
    x, ctx = tokens_of(full)
    y = full.y(x, ctx)
    for name, options in {
        "local": {"window": GRID},
        "global": {"part": "global", "stride": 1},
    }.items():
        s = layer(options)
        assert set(jax.eval_shape(s.init, 0)[0][name]) == set(full.arrays[0])
        close(s.forward(({name: full.arrays[0]}, {}), x, ctx)[0], y)


def test_keys_of_cells_have_no_rotary_positions():
    for part, positions in (("local", "inherit"), ("global", "none")):
        config = shift_equivariance.Config(part=part)
        assert shift_equivariance.layer_config(config).positions == positions


def test_sizes_that_are_not_given_divide_the_axes():
    for part, wanted in (("local", (7, 3)), ("global", (2, 3))):
        config = shift_equivariance.Config(part=part)
        assert shift_equivariance.stride_of(config, (14, 3)) == wanted
    assert shift_equivariance.stride_of(config, (1, None)) == (1, 2)


# ---- models

MODEL = dict(
    embed_dim=16,
    mlp_dim=24,
    patch_size=2,
    positions="anchored_conv",
    mixers={
        "local": {"type": "shift_equivariance", "window": 2},
        "global": {"type": "shift_equivariance", "part": "global"},
    },
)


def logits_of(kind, images, **options):
    """Of a model with noise on all its parameters."""
    config = schema.build(kind.Config, kind.resolve(options))
    make = {vit: vit.ViT, pyramid: pyramid.Pyramid}[kind]
    model = make(config, image_size=8, channels=3, num_classes=5)
    params, buffers = jax.eval_shape(model.init, 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(a.dtype), params
    )

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def call(params, images):
        ctx = model.context(batch=len(images))
        return model.logits(params, buffers, images, ctx)[0]

    buffers = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), buffers)
    return np.asarray(call(params, images))


def shifted_images():
    image = np.random.default_rng(1).normal(size=(1, 64, 3)).astype(np.float32)
    return shifted(image, (8, 8)).reshape(64, 8, 8, 3)


def moved_by(logits):
    return np.abs(logits - logits[0]).max(-1)


def test_a_model_of_windows_and_cells_keeps_its_logits_under_every_shift():
    images = shifted_images()
    options = MODEL | {"layers": "local global", "num_layers": 2, "num_heads": 2}
    options["registers"] = 1
    logits = logits_of(vit, images, **options)
    assert logits.std() > 0.1 and moved_by(logits).max() < 1e-4


def test_a_block_tells_the_stream_in_front_of_its_norm_to_mixers_that_read_it():
    class Reads(nnx.Module):
        reads_residual = shift_equivariance.Mixer.reads_residual

        def __call__(self, x, ctx):
            return ctx.residual, MixerOut()

    block = Block(
        lambda *, rngs: Reads(), BlockDims(embed_dim=3, mlp_dim=0), rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    y, _, _ = block(x, {}, Context(positions=np.zeros((2, 5), np.int32)))
    close(y, 2 * x)


@pytest.mark.parametrize("positions", ["anchored", "none"])
def test_a_pyramid_keeps_them_where_its_stages_begin_at_an_anchor(positions):
    """Else under shifts by all strides together alone."""
    options = MODEL | {"layers": "local", "depths": (1, 1), "num_heads": 2}
    options["mixers"] = {"local": MODEL["mixers"]["local"]}
    options |= {"positions": positions, "cpe": positions == "anchored"}
    logits = logits_of(pyramid, shifted_images(), **options)
    assert logits.std() > 0.1
    moved = moved_by(logits).reshape(8, 8)
    if positions == "anchored":
        assert moved.max() < 1e-4
    else:
        assert moved[::4, ::4].max() < 1e-4
        assert moved[::2, ::2].max() > 1e-2


# ---- hooks, refusals


def test_hooks_read_the_anchored_grid():
    s = layer(LAYERS["local"])
    x, ctx = tokens_of(s, hooks=(Hook("x", "input"),))
    _, found = s.forward(s.arrays, x, ctx)
    wanted, start = nn.anchored(x.reshape(2, *GRID, -1), (3, 2))
    assert np.asarray(start).any()
    close(found.records["x"].reshape(wanted.shape), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"stride": 2}, "stride is that of part=global; got part=local, stride=2"),
        ({"part": "global", "window": 2}, "window is that of part=local.* set stride"),
        ({"part": "global", "positions": "rope"}, "positions=rope is for part=local"),
    ],
)
def test_settings_outside_their_rule_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shift_equivariance.Config(**options)


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="window must divide .* got window=4 on axis 0"):
        layer({"window": 4}).build()
    with pytest.raises(UserError, match="stride must divide .* got stride=3 on axis 1"):
        layer({"part": "global", "stride": 3}).build()
    with pytest.raises(UserError, match="needs the grid.* got a plain sequence"):
        layer({}, None).build()
    s = layer(LAYERS["local"])
    x, ctx = tokens_of(s)
    with pytest.raises(UserError, match=r"made for one grid; got grid=\(4, 6\)"):
        s.call(s.arrays, x, ctx.replace(grid=(4, 6)))
    for call in (lambda m: m.init_state(2, 8), lambda m: m.step(x, None, ctx)):
        with pytest.raises(UserError, match="shift_equivariance: has no decode form"):
            call(s.build())


@pytest.mark.parametrize("part", LAYERS)
def test_output_options_that_change_scores_are_refused(part):
    options = LAYERS[part] | {"output": ({"type": "attention_sink_survey"},)}
    with pytest.raises(UserError, match="shift_equivariance: rows .* type='attention_"):
        layer(options).build()
