"""The stack against a Python loop over its layers, in every way it can be run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context, Hook, MixerOut
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.models import stack
from attnjax.models.block import Block, BlockDims
from attnjax.models.layout import Layout, by_layer, named
from attnjax.models.stack import Stack

B, T, C = 2, 5, 24
# One scan of two repeats of two layers, and a layer alone.
SCHEDULE = "(busy other)*2 busy"


@pytest.fixture(scope="module")
def build(make_model, outside):
    def build(layers=SCHEDULE, *, stream=False, **options):
        busy = {"type": outside("busy"), "stream": stream}
        mixers = {"busy": busy, "other": busy | {"gain": 2.0}}
        mixers = {name: value for name, value in mixers.items() if name in layers}
        return make_model(
            layers=layers, num_layers=None, mixers=mixers, **{"remat": "none"} | options
        )

    return build


def context(**changes):
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    return Context(positions=positions, train=True, **changes)


def input_of(dtype=np.float32):
    return np.random.default_rng(3).normal(size=(B, T, C)).astype(dtype)


def run(model, params, buffers, x, ctx):
    """Value, StackOut and the gradients in x and params."""

    @jax.jit
    def call(params, buffers, x, ctx):
        def loss(params, x):
            y, out = model.stack.apply(params, buffers, x, ctx)
            total = jnp.sum(jnp.sin(y)) + sum(out.losses.values())
            total += sum(jnp.sum(jnp.cos(s)) for s in out.streams.values())
            return total, (y, out)

        (_, (y, out)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, (out.losses, out.records, out.buffers, out.streams), grads

    return call(params, buffers, x, ctx)


def by_hand(model, params, buffers, x, ctx):
    """The same by a Python loop over the layers."""
    layout, stack = model.layout, model.stack

    def forward(layers, x):
        old = by_layer(jax.tree.map(jnp.asarray, buffers), layout)
        streams, losses, records, new = dict(ctx.streams), {}, {}, {}
        for i, name in enumerate(layout.names):
            block = nnx.merge(stack._graphs[name], layers[i], old[i])
            x, streams, out = block(x, streams, ctx.replace(layer_index=i))
            for key, value in out.losses.items():
                losses.setdefault(key, []).append(value)
            if out.records:
                records[i] = out.records
            new[i] = nnx.to_pure_dict(nnx.state(block, nn.Buffer))
        losses = {key: sum(values) / len(values) for key, values in losses.items()}
        return x, (losses, records, new, streams)

    def loss(layers, x):
        y, rest = forward(layers, x)
        total = jnp.sum(jnp.sin(y)) + sum(rest[0].values())
        total += sum(jnp.sum(jnp.cos(s)) for s in rest[3].values())
        return total, (y, rest)

    layers = by_layer(params, layout)
    call = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (y, rest)), grads = call(layers, x)
    return y, rest, grads


def start(model, dtype=np.float32):
    """Parameters of the layers away from their starts, and the first buffers."""
    rng = np.random.default_rng(0)
    params, buffers = jax.eval_shape(model.init, 0)
    params = jax.tree.map(
        lambda a: rng.normal(size=a.shape, scale=0.2).astype(dtype), params["layers"]
    )
    return params, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), buffers["layers"])


def forward(model, params, buffers, ctx):
    """y and StackOut, compiled."""
    return jax.jit(model.stack.apply)(params, buffers, input_of(), ctx)


def same(left, right, tolerance):
    left, right = jax.tree.flatten(left), jax.tree.flatten(right)
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_the_stack_equals_a_loop_over_its_layers_to_the_last_digits(build, stream):
    with jax.enable_x64(True):
        model = build(stream=stream, dtype="float64", param_dtype="float64")
        params, buffers = start(model, np.float64)
        streams = {"side": jnp.asarray(input_of(np.float64)[:1] + 1)} if stream else {}
        arguments = (params, buffers, input_of(np.float64), context(streams=streams))
        y, rest, grads = run(model, *arguments)
        expected, expected_rest, expected_grads = by_hand(model, *arguments)
        assert y.dtype == jnp.float64
        same(y, expected, 1e-12)
        losses, records, new_buffers, out_streams = rest
        same(losses, expected_rest[0], 1e-12)
        assert set(losses) == {"busy"}
        same(records, expected_rest[1], 1e-12)
        assert set(records) == {0, 1, 2, 3, 4}
        same(by_layer(new_buffers, model.layout), expected_rest[2], 1e-12)
        same(out_streams, expected_rest[3], 1e-12)
        same(by_layer(grads[0], model.layout), expected_grads[0], 1e-12)
        same(grads[1], expected_grads[1], 1e-12)


@pytest.fixture(scope="module")
def plain(build):
    model = build()
    return run(model, *start(model), input_of(), context())


@pytest.mark.parametrize(
    "options",
    [{"unroll": "all"}, {"unroll": 3, "remat": "dots"}, {"remat": "full"}],
    ids=str,
)
def test_remat_and_unroll_change_no_result_and_no_layout(build, plain, options):
    model = build(**options)
    same(run(model, *start(model), input_of(), context()), plain, 2e-5)


def test_remat_keeps_fewer_activations(build):
    def stored(remat):
        model = build("busy*4", remat=remat)
        params, buffers = start(model)

        def loss(params, x):
            y, _ = model.stack.apply(params, buffers, x, context())
            return jnp.sum(y)

        kept = jax.eval_shape(lambda *a: jax.vjp(loss, *a)[1], params, input_of())
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    none, dots, full = stored("none"), stored("dots"), stored("full")
    assert full < dots < none


@pytest.mark.parametrize("layers", [(1, 2), (4,), None], ids=str)
def test_a_hook_splits_the_scan_and_changes_no_result(build, plain, layers):
    model = build()
    hook = Hook(name="heads", what="heads", layers=layers)
    behind = Hook(name="behind", what="hidden", layers=layers)
    y, out = forward(model, *start(model), context(hooks=(hook, behind)))
    expected, (losses, records, buffers, _), _ = plain
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    same((out.losses, out.buffers), (losses, buffers), 2e-5)
    seen = {i for i, values in out.records.items() if "heads" in values}
    assert seen == set(range(5) if layers is None else layers)
    assert all("behind" in out.records[layer] for layer in seen)
    if 4 in seen:
        np.testing.assert_array_equal(out.records[4]["behind"], y)
    for i, values in out.records.items():
        np.testing.assert_allclose(
            values["busy_size"], records[i]["busy_size"], rtol=1e-4
        )
        if i in seen:
            size = np.mean(np.square(values["heads"]))
            np.testing.assert_allclose(size, values["busy_size"], rtol=1e-4)


def test_an_intervention_reaches_its_layer_alone_and_new_numbers_do_not_recompile(
    build, plain
):
    model = build()
    params, buffers = start(model)
    hook = Hook(name="mute", what="heads", layers=(2,), action="scale")
    traces = []

    @jax.jit
    def call(params, amount):
        traces.append(1)
        ctx = context(hooks=(hook,), interventions={"mute": amount})
        return model.stack.apply(params, buffers, input_of(), ctx)[0]

    kept = call(params, jnp.float32(1.0))
    np.testing.assert_allclose(kept, plain[0], rtol=2e-5, atol=2e-5)
    muted = call(params, jnp.float32(0.0))
    # Layer 2 is the second repeat of the first place; without its output map it
    # writes nothing, whatever its heads are.
    params["group_0"]["sub_0"]["mixer"]["out"]["kernel"][1] = 0.0
    expected = call(params, jnp.float32(1.0))
    np.testing.assert_allclose(muted, expected, rtol=2e-5, atol=2e-5)
    assert np.max(np.abs(muted - kept)) > 0.1
    assert len(traces) == 1


def test_the_residual_stream_behind_a_layer_can_be_changed(build):
    model = build()
    hook = Hook(name="mute", what="hidden", layers=(4,), action="scale")
    ctx = context(hooks=(hook,), interventions={"mute": jnp.float32(0.0)})
    y, _ = forward(model, *start(model), ctx)
    assert not np.any(y)
    with pytest.raises(UserError, match="model: the intervention 'mute' needs its"):
        model.stack.apply(*start(model), input_of(), context(hooks=(hook,)))


@pytest.mark.parametrize("layers", [(5,), (0, -1)], ids=str)
def test_a_hook_on_a_layer_that_is_not_there_is_refused(build, layers):
    model = build()
    hook = Hook(name="heads", what="heads", layers=layers)
    with pytest.raises(UserError, match=r"hook heads: layers must be in \[0, 5\)"):
        model.stack.apply(*start(model), input_of(), context(hooks=(hook,)))


def test_dropout_draws_from_the_key_and_the_layer(build):
    model = build("busy*2", dropout=0.5, use_bias=True)
    params, buffers = start(model)
    call = jax.jit(lambda *a: model.stack.apply(*a)[0])
    first, again, other = (
        call(params, buffers, input_of(), context(prng_key=jax.random.key(seed)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 0.1
    # Two equal layers that add a constant: what is dropped differs between them.
    params = jax.tree.map(np.zeros_like, params)
    params["group_0"]["sub_0"]["mlp"]["down"]["bias"][:] = 1.0
    added = call(params, buffers, input_of(), context(prng_key=jax.random.key(0)))
    assert set(np.unique(np.round(added - input_of(), 3))) == {0.0, 2.0, 4.0}


# ---- initial values


def test_initial_values_depend_on_seed_and_path_alone(build):
    def values(layers, **options):
        model = build(layers, **options)
        return named(jax.jit(model.init)(5)[0]["layers"], model.layout)

    scanned = values("busy*3")
    # Layer 1 is of another kind, layers 0 and 2 stand in groups of their own.
    for other in (values("busy other busy"), values("busy*3", mlp_dim=48)):
        assert scanned.keys() == other.keys()
        shared = [name for name in scanned if scanned[name].shape == other[name].shape]
        assert len(shared) >= 12
        for name in shared:
            np.testing.assert_array_equal(scanned[name], other[name], err_msg=name)


def test_layers_and_seeds_start_differently(build):
    model = build("busy*3")
    init = jax.jit(lambda seed: model.init(seed)[0]["layers"]["group_0"]["sub_0"])
    kernel, other = (np.asarray(init(s)["mixer"]["out"]["kernel"]) for s in (5, 6))
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert np.max(np.abs(kernel[a] - kernel[b])) > 0.1
    assert np.max(np.abs(kernel - other)) > 0.1
    assert kernel.std() == pytest.approx(0.2, rel=0.05)


# ---- what a foreign module may and may not hold


def test_stacks_of_parts_of_a_layout_join_to_the_whole(build):
    """Layers, means of losses, records and buffers keep their absolute numbers."""
    model = build(stream=True)
    whole = model.stack
    pieces = [
        Stack(whole.layout, whole._make_block, groups=range(g, g + 1)) for g in (0, 1)
    ]
    key = jax.random.key(0)
    params, buffers = jax.jit(whole.init)(key)
    for g, piece in enumerate(pieces):
        assert list(jax.eval_shape(piece.init, key)[0]) == [f"group_{g}"]
    ctx = context(streams={"side": jnp.ones((1, T, C))})

    @jax.jit
    def both(x):
        y, out = whole.apply(params, buffers, x, ctx)
        first, second = pieces
        x, one = first.part(params, buffers, x, ctx)
        x, two = second.part(params, buffers, x, ctx.replace(streams=one.streams))
        return (y, out), (x, stack.joined([one, two]))

    wanted, found = both(input_of())
    assert sorted(found[1].records) == list(range(5))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted
    )


class Foreign(nnx.Module):
    """A mixer that holds what `held` makes, beside a list of maps."""

    def __init__(self, held=None, *, rngs):
        make = partial(nn.Linear, C, C, rngs=rngs)
        self.maps = nnx.List([make(std=0.1), make(std=0.3)])
        self.bare = nnx.Param(jax.random.normal(rngs.params(), (C,)))
        self.held = None if held is None else held(rngs)

    def __call__(self, x, ctx):
        return self.maps[1](self.maps[0](x)) * self.bare, MixerOut()


def stack_of(held=None, names=("foreign",) * 3):
    dims = BlockDims(embed_dim=C, mlp_dim=0)

    def make_block(name, *, rngs):
        return Block(partial(Foreign, held), dims, rngs=rngs)

    return Stack(Layout.of(names), make_block)


def test_a_module_with_a_list_and_a_bare_parameter_runs():
    stack = stack_of()
    params, buffers = jax.jit(stack.init)(jax.random.key(0))
    mixer = params["group_0"]["sub_0"]["mixer"]
    assert mixer["maps"][1]["kernel"].shape == (3, C, C)
    # No initialiser travels with a bare parameter: it is drawn a layer at a time.
    assert np.max(np.abs(mixer["bare"][0] - mixer["bare"][1])) > 0.1
    y, _ = jax.jit(stack.apply)(params, buffers, input_of(), context())
    assert y.shape == (B, T, C)
    assert sorted(named(params, stack.layout))[0] == "layers/000/mixer/bare"
    assert "layers/002/mixer/maps/1/kernel" in named(params, stack.layout)


def test_a_variable_of_another_kind_is_refused_with_the_rule():
    with pytest.raises(UserError, match=r"foreign: every variable of a mixer must be"):
        stack_of(lambda rngs: nnx.BatchStat(jnp.zeros(3)))


def test_a_mixer_without_a_decode_form_cannot_decode(build):
    model = build("busy*2")
    params, buffers = jax.eval_shape(model.init, 0)
    params, buffers = jax.tree.map(
        lambda a: np.zeros(a.shape, a.dtype), (params, buffers)
    )
    arrays = model.unstack(params, buffers)
    with pytest.raises(UserError, match="busy: has no decode form; generation needs"):
        model.init_state(arrays, 1, 4)


def test_dims_reach_the_mixers(build):
    model = build("busy*3", num_kv_heads=1, init_std=0.03)
    dims = model.dims
    assert isinstance(dims, MixerDims)
    assert (dims.num_layers, dims.num_kv_heads, dims.head_dim) == (3, 1, 8)
    assert dims.out_init_std == pytest.approx(0.03 / np.sqrt(6))


def test_losses_are_means_over_the_layers_that_report_them():
    """Three layers of two groups report one of them, one layer the other."""
    found = {
        ("losses", "a"): [np.float32([1, 2]), np.float32([6])],
        ("losses", "b"): [np.float32([5])],
        ("metrics", "a"): [np.float32([7])],
    }
    assert stack._means(found, "losses") == {"a": 3.0, "b": 5.0}
    assert stack._means(found, "metrics") == {"a": 7.0}
