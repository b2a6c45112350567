"""The multimodal diffusion transformer: what it computes, counts and refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.core import schema
from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError
from attnjax.models import mmdit, text_encoder
from attnjax.models.block import Block
from attnjax.models.joint_block import JointBlock
from attnjax.models.layout import path_of
from attnjax.models.text_encoder import END, PADDING
from attnjax.training import sharding

B, SIDE, CHANNELS, M, N = 2, 6, 2, 5, 9
TEXT = dict(num_layers=1, embed_dim=12, num_heads=2, max_len=M)
SMALL = dict(embed_dim=16, num_heads=2, num_layers=3, patch_size=2, mlp_dim=24)
CAPTIONS = np.asarray([[104, 105, END, PADDING, PADDING], [97, 195, 169, 33, END]])


def make(*, image_size=SIDE, channels=CHANNELS, **options):
    given = {**SMALL, "text": TEXT, **options}
    config = schema.build(mmdit.Config, mmdit.resolve(given))
    return mmdit.MMDiT(
        config, image_size=image_size, channels=channels, out_channels=channels
    )


def start(model, seed=0):
    """Arrays from numpy, away from the zeros of the first values."""
    rng = np.random.default_rng(seed)
    params, buffers = jax.eval_shape(model.init, 0)
    params = jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), params
    )
    return params, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), buffers)


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(B, SIDE, SIDE, CHANNELS)).astype(np.float32)
    return images, np.asarray([0.03, 0.871], np.float32), CAPTIONS


@pytest.fixture(scope="module")
def plain():
    """(a model without positions, its arrays, its compiled pass with a hook behind the
    first layer)."""
    model = make(positions="none")
    hook = Hook("row", "hidden", layers=(0,))

    @jax.jit
    def call(params, buffers, images, times, captions):
        ctx = model.context(batch=B).replace(hooks=(hook,))
        found, out = model.predict(params, buffers, images, times, captions, ctx)
        return found, out.records[0]["row"]

    return model, start(model), call


def close(found, wanted, share=1e-4):
    np.testing.assert_allclose(found, wanted, atol=share * np.abs(wanted).max())


# ---- at the start


def test_at_the_start_it_predicts_zero_and_every_layer_passes_its_input_on():
    model = make(num_layers=2)
    params, buffers = jax.jit(model.init)(0)
    images, times, captions = inputs()
    x = np.random.default_rng(3).normal(size=(B, M + N, 16)).astype(np.float32)

    @jax.jit
    def call(params):
        ctx = model.context(batch=B)
        found, _ = model.predict(params, buffers, images, times, captions, ctx)
        ctx = ctx.replace(condition=jnp.ones((B, 16)))
        return found, model.run(params, buffers, x, ctx)[0]

    found, passed = call(params)
    assert not np.any(found)
    np.testing.assert_array_equal(passed, x)


# ---- what the streams see


def test_without_positions_it_commutes_with_any_order_of_the_patches(plain):
    _, (params, buffers), call = plain
    images, times, captions = inputs()
    order = np.random.default_rng(3).permutation(N)

    def moved(x):
        patches = nn.patchify(jnp.asarray(x), 2)[:, order]
        return np.asarray(nn.unpatchify(patches, (3, 3), 2))

    found, _ = call(params, buffers, moved(images), times, captions)
    wanted, _ = call(params, buffers, images, times, captions)
    close(found, moved(wanted))


def test_text_and_image_see_each_other_in_their_own_row(plain):
    _, (params, buffers), call = plain
    images, times, captions = inputs()
    base, row = call(params, buffers, images, times, captions)
    other = captions.copy()
    other[1, 0] += 1
    found, _ = call(params, buffers, images, times, other)
    np.testing.assert_array_equal(found[0], base[0])
    assert np.all(found[1] != base[1])
    changed = images.copy()
    changed[1, 0, 0] += 1.0
    found, seen = call(params, buffers, changed, times, captions)
    np.testing.assert_array_equal(found[0], base[0])
    # The text stands in front, and has seen the image behind one layer.
    assert np.all(seen[1, :M] != row[1, :M])
    np.testing.assert_array_equal(seen[0], row[0])


def test_padding_of_the_text_has_no_influence(plain):
    model, (params, buffers), _ = plain
    images, times, captions = inputs()

    @jax.jit
    def call(noise):
        ctx = model.context(batch=B)
        features, pooled, is_token = model.encode(params, captions)
        features = jnp.where(is_token[..., None], features, noise)
        text = (features, pooled, is_token)
        return model.denoise(params, buffers, images, times, text, ctx)[0], is_token

    wanted, is_token = call(0.0)
    np.testing.assert_array_equal(is_token.sum(1), [3, 5])
    np.testing.assert_array_equal(call(7.0)[0], wanted)


def test_room_behind_a_caption_changes_nothing(plain):
    """Nor in its encoder: three tokens of five are those of a model for three."""
    model, (params, buffers), call = plain
    images, times, captions = inputs()
    captions = np.where(np.arange(M) < 3, captions, PADDING)
    captions[:, 2] = END
    wanted, _ = call(params, buffers, images, times, captions)
    small = make(positions="none", text={**TEXT, "max_len": 3})
    encoder = params["text_encoder"]
    table = {"table": encoder["position_embedding"]["table"][:3]}
    less = params | {"text_encoder": encoder | {"position_embedding": table}}

    @jax.jit
    def short(params):
        ctx = small.context(batch=B)
        return small.predict(params, buffers, images, times, captions[:, :3], ctx)[0]

    close(short(less), wanted)
    assert model.num_tokens - small.num_tokens == 2


# ---- the layer


def test_streams_of_equal_maps_are_one_layer_over_all_tokens():
    """And in the last layer, whose text goes no further, the image is that layer's."""
    model = make()

    def make_mixer(*, rngs):
        return model.choices["attention"].make(model.dims, rngs=rngs)

    whole = Block(make_mixer, model.block_dims, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(whole)
    state = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), state
    )
    whole = nnx.merge(graph, state)
    x = jnp.asarray(rng.normal(size=(B, M + N, 16)), jnp.float32)
    condition = jnp.asarray(rng.normal(size=(B, 16)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(M + N), (B, M + N))
    ctx = Context(positions=positions, causal=False, condition=condition)
    wanted, _, _ = jax.jit(lambda x: whole(x, {}, ctx))(x)
    own = nnx.to_pure_dict(state)
    for is_last in (False, True):
        block = JointBlock(
            make_mixer, model.block_dims, is_last=is_last, rngs=nnx.Rngs(1)
        )
        text = dict(own)
        if is_last:
            text = {"mixer": dict(own["mixer"])}
            del text["mixer"]["out"]
            two = jax.tree.map(lambda a: a[..., :32], own["modulation"])
            text["modulation"] = two
        nnx.update(block, {"image": own, "text": text})
        here = ctx.replace(extra_tokens=M)
        found, _, _ = jax.jit(lambda x, b=block, c=here: b(x, {}, c))(x)
        close(found[:, M:], wanted[:, M:], 1e-5)
        close(found[:, :M], x[:, :M] if is_last else wanted[:, :M], 1e-5)


def written_out(arrays, x, condition):
    """A layer [B, M + N, C] -> the same in float64, by loops over rows and heads."""
    streams = [
        jax.tree.map(lambda a: np.asarray(a, np.float64), arrays[name])
        for name in ("text", "image")
    ]
    silu = condition / (1 + np.exp(-condition))
    return np.stack([_row(streams, x[b], silu[b]) for b in range(len(x))])


def _linear(own, x):
    return x @ own["kernel"] + own["bias"]


def _steered(x, shift, scale):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * (1 + scale) + shift


def _row(streams, x, silu):
    parts = (x[:M], x[M:])
    six = [np.split(_linear(own["modulation"]["linear"], silu), 6) for own in streams]
    read = [_steered(p, *s[:2]) for p, s in zip(parts, six, strict=True)]
    query, key, value = (
        np.concatenate(
            [_linear(o["mixer"][name], r) for o, r in zip(streams, read, strict=True)]
        )
        for name in ("query", "key", "value")
    )
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = np.exp(query[:, head] @ key[:, head].T / np.sqrt(8))
        heads.append(weights / weights.sum(1, keepdims=True) @ value[:, head])
    heads = np.concatenate(heads, axis=1)
    found = []
    for own, part, s, y in zip(
        streams, parts, six, (heads[:M], heads[M:]), strict=True
    ):
        part = part + s[2] * _linear(own["mixer"]["out"], y)
        up = _linear(own["mlp"]["up"], _steered(part, *s[3:5]))
        gelu = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        found.append(part + s[5] * _linear(own["mlp"]["down"], gelu))
    return np.concatenate(found)


def test_each_stream_goes_through_its_own_maps():
    """As written out with them; with those of the other one it is something else, be it
    a single map."""
    model = make()

    def make_mixer(*, rngs):
        return model.choices["attention"].make(model.dims, rngs=rngs)

    block = JointBlock(make_mixer, model.block_dims, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(block)
    state = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), state
    )
    x, condition = rng.normal(size=(B, M + N, 16)), rng.normal(size=(B, 16))
    positions = jnp.broadcast_to(jnp.arange(M + N), (B, M + N))
    ctx = Context(positions=positions, causal=False, extra_tokens=M)
    ctx = ctx.replace(condition=jnp.asarray(condition, jnp.float32))
    run = jax.jit(lambda x: nnx.merge(graph, state)(x, {}, ctx)[0])
    found = np.asarray(run(jnp.asarray(x, jnp.float32)))
    own = nnx.to_pure_dict(state)
    wanted = written_out(own, x, condition)
    close(found, wanted, 1e-5)
    size = np.abs(wanted).max()
    paths = [path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(own["text"])]
    for path in paths:
        other = jax.tree.map(lambda a: a, own)
        text, image = other["text"], other["image"]
        for name in path[:-1]:
            text, image = text[name], image[name]
        last = path[-1]
        text[last], image[last] = image[last], text[last]
        swapped = written_out(other, x, condition)
        assert np.abs(swapped - found).max() > 1e-3 * size, path


def test_every_array_of_both_streams_learns_but_what_asks_for_the_last_text():
    """Nothing reads what the last text's queries find."""
    model = make(num_layers=3, qk_norm=True)
    params, buffers = start(model)

    @jax.jit
    def slopes(params):
        def loss(params):
            ctx = model.context(batch=B)
            return jnp.sum(model.predict(params, buffers, *inputs(), ctx)[0] ** 2)

        return jax.grad(loss)(params)

    found, still = slopes(params), set()
    layers = found["layers"]
    assert {len(a) for a in jax.tree.leaves(layers["group_0"])} == {2}
    for key_path, slope in jax.tree_util.tree_leaves_with_path(layers):
        sizes = np.abs(slope).reshape(len(slope), -1).max(axis=1)
        if not np.all(sizes > 0):
            assert not np.any(sizes)
            still.add("/".join(path_of(key_path)))
    last = "group_1/sub_0/text/mixer"
    assert still == {
        f"{last}/query/kernel",
        f"{last}/query/bias",
        f"{last}/query_norm/scale",
    }
    ends = {name: found[name] for name in found if name != "layers"}
    for key_path, slope in jax.tree_util.tree_leaves_with_path(ends):
        path = path_of(key_path)
        if path[0] == "text_encoder" and path[-2:] == ("key", "bias"):
            # What all keys of a row share is nothing to a softmax.
            assert np.abs(slope).max() < 1e-4 * np.abs(ends["head"]["bias"]).max()
        else:
            assert np.any(slope), path


def test_scanned_layers_are_the_unrolled_ones():
    found = []
    for options in ({}, {"unroll": "all", "remat": "none"}):
        model = make(**options)
        params, buffers = start(model)

        @jax.jit
        def call(params, model=model, buffers=buffers):
            ctx = model.context(batch=B)
            return model.predict(params, buffers, *inputs(), ctx)[0]

        found.append(call(params))
    close(*found, 1e-5)


def test_weights_of_a_layer_are_those_of_the_joint_row():
    """Text first, nothing on its padding; heads moved to themselves in every layer."""
    model = make(positions="rope", layers="gated_attention", num_layers=2, qk_norm=True)
    params, buffers = start(model)
    record = Hook("weights", "weights")
    blend = Hook("own", "weights", action="blend_identity")

    @jax.jit
    def call(params, share):
        ctx = model.context(batch=B)
        ctx = ctx.replace(hooks=(record, blend), interventions={"own": share})
        return model.predict(params, buffers, *inputs(), ctx)[1].records

    for layer in (0, 1):
        weights = call(params, 0.0)[layer]["weights"]
        assert weights.shape == (B, 2, M + N, M + N)
        np.testing.assert_allclose(weights[:, :, M:].sum(-1), 1, atol=1e-5)
        assert not np.any(weights[0, :, M:, 3:M]) and np.all(weights[0, :, M:, :3])
        moved = call(params, 1.0)[layer]["weights"][1, 0]
        np.testing.assert_allclose(moved, np.eye(M + N), atol=1e-6)


def test_patches_alone_are_moved_to_themselves():
    """II-identity and its renormalised form: rows of the text stay, those of patches
    keep all keys of the text."""
    model = make(positions="rope", num_layers=1)
    params, buffers = start(model)

    @partial(jax.jit, static_argnums=0)
    def call(hooks, shares):
        ctx = model.context(batch=B)
        ctx = ctx.replace(hooks=hooks, interventions={"own": shares})
        found, out = model.predict(params, buffers, *inputs(), ctx)
        return found, out.records

    def blend(target):
        return Hook("own", "weights", action=f"blend_{target}")

    record = Hook("weights", "weights")
    shares = np.float32([1.0, 0.3])
    fused = call((blend("image_identity"),), shares)[0]
    written = (blend("image_identity"), record)
    base = np.asarray(call(written, 0 * shares)[1][0]["weights"], np.float64)
    text, image, eye = base[:, :, M:, :M], base[:, :, M:, M:], np.eye(N)
    own = image * eye
    total = text.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    targets = {
        "image_identity": np.concatenate([text, own], -1) / total,
        "image_gathered": np.concatenate(
            [text, image.sum(-1, keepdims=True) * eye], -1
        ),
    }
    u = shares[:, None, None].astype(np.float64)
    for name, target in targets.items():
        laid_open, records = call((blend(name), record), shares)
        weights = records[0]["weights"]
        np.testing.assert_allclose(weights[:, :, :M], base[:, :, :M], atol=1e-6)
        wanted = (1 - u) * base[:, :, M:] + u * target
        np.testing.assert_allclose(weights[:, :, M:], wanted, atol=2e-6)
        np.testing.assert_allclose(weights[:, :, M:].sum(-1), 1, atol=1e-5)
        if name == "image_identity":
            close(fused, laid_open, 1e-5)
    whole = call((blend("identity"), record), shares)[1][0]["weights"]
    assert np.abs(whole[:, 0, :M] - base[:, 0, :M]).max() > 0.1


def test_what_streams_cannot_share_belongs_to_one_of_them():
    """Sink logits are the image's; the last text has no gate, unless it is of keys or
    values."""
    sink = {"attention": {"weight_map": "sink_logit"}}
    layers = jax.eval_shape(make(mixers=sink).init, 0)[0]["layers"]
    first, last = (layers[f"group_{g}"]["sub_0"] for g in (0, 1))
    assert "sink" in first["image"]["mixer"] and "sink" not in first["text"]["mixer"]
    assert "out" in first["text"]["mixer"] and "out" not in last["text"]["mixer"]
    for position, is_kept in (("g1", False), ("g2", True)):
        gate = {"gated_attention": {"position": position}}
        model = make(layers="gated_attention", mixers=gate)
        layers = jax.eval_shape(model.init, 0)[0]["layers"]
        first, last = (layers[f"group_{g}"]["sub_0"]["text"] for g in (0, 1))
        assert "slot_gated_attention" in first["mixer"]
        assert ("slot_gated_attention" in last["mixer"]) is is_kept


def test_losses_of_both_streams_are_one():
    model = make(layers="moh", num_layers=2)
    params, buffers = start(model)

    def call(params):
        ctx = model.context(batch=B)
        return model.predict(params, buffers, *inputs(), ctx)[1]

    out = jax.eval_shape(call, params)
    assert out.losses and all(value.shape == () for value in out.losses.values())


# ---- counting


@pytest.mark.parametrize(
    ("depth", "qk_norm", "released"),
    [(24, False, 2_028_328_000), (38, True, 8_056_627_520)],
)
def test_parameters_are_those_of_the_released_models(depth, qk_norm, released):
    """Theirs read features of width 4096 and pooled vectors of width 2048."""
    dim, width = 64 * depth, TEXT["embed_dim"]
    options = dict(embed_dim=dim, num_heads=depth, num_layers=depth, mlp_dim=None)
    model = make(image_size=64, channels=16, qk_norm=qk_norm, **options)
    encoder = jax.eval_shape(model.init, 0)[0]["text_encoder"]
    inside = sum(leaf.size for leaf in jax.tree.leaves(encoder))
    told = (4096 + 2048 - 2 * width) * dim
    assert model.parameter_count() - inside + told == released
    vocabulary = (END + 1 + M) * width
    blocks = 12 * width**2 + 13 * width
    assert inside == vocabulary + TEXT["num_layers"] * blocks + 2 * width


def test_operations_are_counted_like_those_of_a_written_out_model():
    model = make(num_layers=1)
    dim, mlp, width, tokens = 16, 24, 12, M + N
    text = 12 * width**2 * M + 2 * M * M * width
    layer = (3 * tokens + N) * dim**2 + 2 * tokens**2 * dim + 2 * N * dim * mlp
    told = (256 + dim + width + dim) * dim + (6 + 2 + 2) * dim**2
    ends = M * width * dim + N * 4 * (CHANNELS + CHANNELS) * dim
    assert model.flops() == 2 * (text + layer + told + ends)


def test_widths_are_matched_to_a_baseline():
    gated = make(layers="gated_attention", params="match", mlp_dim=200)
    plain = make(mlp_dim=200).parameter_count()
    assert abs(gated.parameter_count() / plain - 1) < 0.02
    assert gated.matched.mlp_dim < 200


# ---- captions, images, devices


def test_captions_are_dropped_at_their_rate():
    model = make(caption_dropout=0.25)
    captions = np.tile(CAPTIONS, (1000, 1))
    dropped = np.asarray(model.drop_labels(jnp.asarray(captions), jax.random.key(0)))
    gone = np.all(dropped == np.asarray(text_encoder.empty(M)), axis=1)
    assert gone.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(dropped[~gone], captions[~gone])
    sure = make(caption_dropout=0.0)
    assert sure.null_label is None
    np.testing.assert_array_equal(sure.drop_labels(captions, None), captions)


def test_positions_come_from_the_middle_of_their_table():
    model = make(positions_grid=7, positions_step=0.5)
    params, _ = start(model)
    images, *_ = inputs()
    added = model.embed(params, images) - make(positions="none").embed(params, images)
    table = nn.sincos_at(np.arange(7) / 2, np.arange(7) / 2, 16, reaches_end=False)
    wanted = table.reshape(7, 7, 16)[2:5, 2:5].reshape(N, 16)
    np.testing.assert_allclose(added[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_dropout": 1.0}, "caption_dropout: must be in .0, 1.; got 1.0"),
        ({"time_features": 7}, "time_features: must be even.*got 7"),
        ({"scale_out_init": True}, "scale_out_init=true, init_std=none"),
        ({"zero_centered_norm": True}, "no scales without qk_norm"),
        ({"positions_grid": 2}, "must hold the patches of an image; got 2, 3 along"),
        ({"positions_step": 0.0}, "positions_step: must be positive; got 0.0"),
        ({"positions": "rope", "positions_step": 0.5}, "is of sincos positions"),
        ({"image_size": 7}, "must divide config.data.image_size; got patch_size=2"),
        ({"text": {"max_len": 0}}, "max_len must be at least 1; got max_len=0"),
        ({"text": {"num_heads": 5}}, "num_heads must divide embed_dim"),
        ({"layers": "linear_attention"}, "got linear_attention, a mixer of its own"),
        ({"layers": "talking_heads"}, "got talking_heads, a mixer of its own"),
        ({"mixers": {"attention": {"window": 3}}}, "window: joint attention sees all"),
        ({"mixers": {"attention": {"cross": True}}}, "cross: joint attention sees"),
        ({"mixers": {"attention": {"positions": "alibi"}}}, "at no distance from each"),
        ({"layers": "tap_adl"}, "reads its weights; got type='tap_adl'"),
        (
            {"mixers": {"attention": {"output": [{"type": "attention_sink_survey"}]}}},
            "scores and weight map belong to both streams; got .*attention_sink_survey",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_inputs_of_another_size_are_refused():
    model = make(num_layers=1)
    params, buffers = start(model)
    images, times, captions = inputs()

    def call(images, captions, hooks=()):
        ctx = model.context(batch=B).replace(hooks=hooks)
        jax.eval_shape(
            lambda p: model.predict(p, buffers, images, times, captions, ctx)[0],
            params,
        )

    with pytest.raises(UserError, match=r"got shape \(2, 4\), max_len=5"):
        call(images, captions[:, :4])
    with pytest.raises(
        UserError, match="mmdit: images .* build the model for that size."
    ):
        call(images[:, :4], captions)
    with pytest.raises(UserError, match="joint attention: unknown hook 'gate'"):
        call(images, captions, (Hook("gates", "gate", layers=(0,)),))


def test_every_large_array_has_logical_axes():
    """Of all arrays only vectors stay whole."""
    params, _ = jax.eval_shape(make().init, 0)
    found, ends = {}, set()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        axes = sharding.logical_axes(path, leaf.ndim)
        found["/".join(path)] = [axis for axis in axes if axis != "layers"]
        ends.add(path[0])
    whole = {path for path, axes in found.items() if len(axes) > 1 and not any(axes)}
    assert not whole
    assert ends - {"layers"} <= set(sharding.ENDS)
