"""Reversed attention: the facts of its paper (arXiv 2304.03282)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid_layers import applied, close, heads, made, out, tokens, wide

from attnjax.conformance.subject import jitted
from attnjax.core import schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention, dependencyvit
from attnjax.mixers.dependencyvit import KEPT, MESSAGE
from attnjax.models import dit, pyramid, vit

D, T = 4, 12
PROBES = tuple(Hook(name, name) for name in ("weights", "selector", "message"))


def layer(options=None, **dims):
    return made(dependencyvit, None, options or {}, **dims)


def with_message(ctx, seed=7):
    """What the layers before have left of each token's message."""
    shape = ctx.carried[MESSAGE].shape
    before = np.random.default_rng(seed).uniform(0.2, 1.0, shape).astype(np.float32)
    return ctx.replace(carried=ctx.carried | {MESSAGE: before})


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def controller(params, x):
    """The share of its message that each token keeps, [B, T]."""
    hidden = applied(params["controller"]["inner"], x)
    phi = 0.5 * (1 + np.asarray(jax.scipy.special.erf(hidden / np.sqrt(2))))
    return sigmoid(applied(params["controller"]["outer"], hidden * phi)[..., 0])


def selector(params, x, temperature=0.1):
    """[B, T, H]."""
    logits = applied(params["selector"], x) / temperature
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@functools.cache
def probed():
    """A layer with the records of one pass, and what they should be made from."""
    s = layer()
    x, ctx = tokens(s, hooks=PROBES)
    ctx = with_message(ctx)
    y, found = s.forward(s.arrays, x, ctx)
    records = {name: np.asarray(a) for name, a in found.records.items()}
    return s, x, ctx, np.asarray(y), records, found.carried


# ---- what the paper says


def test_the_two_passes_equal_the_dense_form():
    """The layer's kernels against softmax, transposition and gates written out; heads
    that share keys and values too."""
    s = layer()
    x, ctx = tokens(s)
    ctx = with_message(ctx)
    params = wide(s.arrays[0])
    query, key, value = heads(params, x, D)
    assert key.shape[2] == query.shape[2] // 2
    scores = np.einsum("bihd,bjhd->bhij", query, np.repeat(key, 2, 2)) / D**0.5
    e = np.exp(scores - scores.max(-1, keepdims=True))
    forward = e / e.sum(-1, keepdims=True)
    p = selector(params, x)
    m = ctx.carried[MESSAGE] * controller(params, x)
    found = np.zeros(query.shape)
    for i in range(T):  # Each child gives a share of its value to every parent.
        sent = p[:, i] * m[:, i, None]
        share = np.swapaxes(forward[:, :, i], 1, 2) * sent[:, None]
        found += share[..., None] * np.repeat(value, 2, 2)[:, None, i]
    close(s.y(x, ctx), out(params, found))
    more = (np.repeat(a, 2, 2) for a in (key, value))
    y, _ = jitted(dependencyvit.reference)(query, *more, p, m)
    close(y, found)


def test_what_a_child_sends_over_heads_and_parents_is_its_message():
    _, _, ctx, _, records, carried = probed()
    close(records["weights"].sum((1, 2)), records["message"], atol=1e-6)
    np.testing.assert_array_equal(records["message"], carried[MESSAGE])
    assert np.all(records["message"] < ctx.carried[MESSAGE])


def test_weights_of_the_layer_are_those_of_the_definition():
    s, x, _, _, records, _ = probed()
    query, key, value = heads(wide(s.arrays[0]), x, D)
    more = (np.repeat(a, 2, 2) for a in (key, value))
    parts = (records["selector"], records["message"])
    _, reversed_ = jitted(dependencyvit.reference)(query, *more, *parts)
    close(records["weights"], reversed_, atol=1e-6)


def test_what_a_parent_receives_is_not_normalised():
    """Ten copies of one token whose messages all go to another one."""
    key = np.zeros((1, 11, 1, 2))
    key[0, 0] = 20
    ones = np.ones((1, 11, 1))
    _, reversed_ = dependencyvit.reference(key + 1, key, key, ones, ones[..., 0])
    received = np.asarray(reversed_).sum(-1)[0, 0]
    assert received[0] > 10 and received[1:].max() < 1e-3


def test_without_gates_a_symmetric_doubly_stochastic_map_is_ordinary_attention():
    """Tokens on a circle, with queries equal to keys."""
    one = dict(head_dim=2, num_heads=1, num_kv_heads=1)
    s = layer({"selector": False, "controller": False}, **one)
    plain = made(attention, None, **one)
    params = dict(plain.arrays[0])
    frame = np.zeros((20, 2), np.float32)
    frame[:2] = 2 * np.eye(2)
    params |= {name: {"kernel": frame} for name in ("query", "key")}
    x, ctx = tokens(plain, batch=1)
    angles = 2 * np.pi * np.arange(T) / T
    x[0, :, :2] = np.stack([np.cos(angles), np.sin(angles)], -1)
    ys = [np.asarray(m.forward((params, {}), x, ctx)[0]) for m in (s, plain)]
    close(*ys)
    assert np.abs(ys[0]).max() > 0.1


def test_tokens_in_another_order_give_the_same_in_that_order():
    s, x, ctx, y, *_ = probed()
    order = np.random.default_rng(3).permutation(T)
    moved = ctx.replace(carried={MESSAGE: ctx.carried[MESSAGE][:, order]})
    again, _ = s.forward(s.arrays, x[:, order], moved)
    close(again, y[:, order])


def test_a_small_temperature_chooses_one_head_and_a_large_one_all():
    s, x, ctx, *_ = probed()
    layers = [layer({"temperature": t}) for t in (1e-4, 1e4)]
    calls = lambda: [m.call(s.arrays, x, ctx)[1].records for m in layers]  # noqa: E731
    cold, warm = jitted(lambda: [r["selector"] for r in calls()])()
    close(np.sort(cold)[..., -1], 1.0, atol=1e-3)
    close(warm, 1 / 6, atol=1e-3)


def test_the_selector_is_that_of_the_sender():
    s, x, _, _, records, _ = probed()
    close(records["selector"], selector(wide(s.arrays[0]), x), atol=1e-4)
    sent = records["weights"].sum(2) / records["message"][:, None]
    close(np.swapaxes(sent, 1, 2), records["selector"], atol=1e-5)


# ---- messages through a model

SMALL = dict(embed_dim=12, num_heads=2, patch_size=2, mlp_dim=8, pool="mean")
DEEP = ("dependencyvit", "attention") * 2
OWN = (0, 2)


def model_of(layers=DEEP, *, mixer=None, like=vit, **options):
    names = dict.fromkeys(name for name in layers if name != "attention")
    mixers = {name: {"type": "dependencyvit", **(mixer or {})} for name in names}
    given = {**SMALL, "layers": list(layers), "mixers": mixers, **options}
    config = schema.build(like.Config, like.resolve({"name": "vit", **given}))
    return like.ViT(config, image_size=6, channels=1, num_classes=3)


def start(model):
    params, buffers = jax.eval_shape(model.init, 0)
    rng = np.random.default_rng(0)
    draw = lambda a: rng.normal(size=a.shape).astype(a.dtype)  # noqa: E731
    return jax.tree.map(lambda a: 0.5 * draw(a), params), buffers


IMAGES = np.random.default_rng(4).normal(size=(2, 6, 6, 1)).astype(np.float32)


def run(model, params, buffers, *names, trains=True):
    """The normed features, the records of `names` and of what leaves the last layer,
    what is handed on, and the gradient of the first where the model `trains`."""
    hooks = [Hook(name, name, layers=OWN) for name in names]
    hooks = (*hooks, Hook("hidden", "hidden", layers=(3,)))

    @jitted
    def call(params):
        def loss(params):
            ctx = model.context(batch=2).replace(hooks=hooks)
            x, found = model.hidden(params, buffers, IMAGES, ctx)
            return jnp.sum(jnp.sin(x)), (x, found.records, found.carried)

        if not trains:
            return *loss(params)[1], None
        (_, found), grad = jax.value_and_grad(loss, has_aux=True)(params)
        return *found, grad

    return jax.tree.map(np.asarray, call(params))


@functools.cache
def deep():
    """A model with layers of another kind between, and its own layers' records."""
    model = model_of(remat="full")
    params, buffers = start(model)
    return model, params, buffers, run(model, params, buffers, "input", "message")


def normed(model, params, records):
    """What leaves the last layer, normed."""
    x = np.asarray(records[3]["hidden"], np.float64)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.norm_eps)
    return x * params["final_norm"]["scale"] + params["final_norm"]["bias"]


def test_messages_never_grow_with_depth():
    _, _, _, (_, records, carried, _) = deep()
    messages = [records[i]["message"] for i in OWN]
    for before, after in zip([np.ones((2, 9)), *messages], messages, strict=False):
        assert np.all((after > 0) & (after < before))
    np.testing.assert_array_equal(carried[MESSAGE], messages[-1])


def test_messages_are_a_running_product_past_layers_of_other_kinds():
    model, params, _, (_, records, _, _) = deep()
    expected = np.ones((2, 9))
    for i in OWN:
        g, j, n, _ = model.layout.places[i]
        own = params["layers"][f"group_{g}"][f"sub_{j}"]["mixer"]
        own = wide(jax.tree.map(lambda a, n=n: a[n], own))
        expected = expected * controller(own, records[i]["input"])
        close(records[i]["message"], expected, atol=1e-6)


def test_scanned_and_rematerialised_layers_hand_on_what_unrolled_ones_do():
    _, params, buffers, (x, _, carried, grad) = deep()
    plain = model_of(remat="none", unroll="all")
    other_x, _, other_carried, other_grad = run(plain, params, buffers)
    close(x, other_x)
    close(carried[MESSAGE], other_carried[MESSAGE])
    first = grad["layers"]["group_0"]["sub_0"]["mixer"]["controller"]["inner"]["kernel"]
    assert np.abs(first).max() > 1e-6
    jax.tree.map(functools.partial(close, atol=1e-4), grad, other_grad)


@pytest.mark.parametrize("features", ["auto", "normed", "residual", "none"])
def test_messages_weigh_the_last_features(features):
    model = model_of(("dependencyvit",), mixer={"features": features})
    x = np.random.default_rng(6).normal(size=(2, 9, 12)).astype(np.float32)
    m = np.random.default_rng(7).uniform(size=(2, 9)).astype(np.float32)
    found = type("Out", (), {"carried": {MESSAGE: jnp.asarray(m)}})
    weighs = "normed" if features == "auto" else features
    for place in ("residual", "normed"):
        expected = x * m[..., None] if place == weighs else x
        close(model.weighed(jnp.asarray(x), found, place), expected, atol=0)


def test_the_features_of_a_model_are_weighed_by_its_last_message():
    model, params, _, (x, records, carried, _) = deep()
    plain = normed(model, params, records)
    close(x, plain * carried[MESSAGE][..., None], atol=1e-4)


# ---- leaving tokens out


def test_four_prunings_keep_the_shares_of_the_paper():
    config = dependencyvit.Config(prune=(2, 5, 8, 11))
    left = dependencyvit.counts(config, 10_000, 12)
    assert list(left[:3]) == [10_000, 10_000, 8_400]
    steps = left[[2, 5, 8, 11]] / left[[1, 4, 7, 10]]
    np.testing.assert_allclose(steps, [0.84, 0.8095, 0.7647, 0.6923], atol=1e-4)
    assert left[-1] == 3_600
    assert dependencyvit.counts(config, 196, 12)[-1] == 71


def test_the_strongest_of_those_left_are_kept_and_the_first_of_equal_ones():
    score = jnp.asarray([[5.0, 9.0, 1.0, 3.0, 3.0]])
    kept = jnp.asarray([[True, False, True, True, True]])
    found = jitted(dependencyvit.strongest)(score, kept, 2)
    assert found.tolist() == [[True, False, False, True, False]]
    assert (dependencyvit.strongest(score, kept, 5) == kept).all()


PRUNED = {"prune": (0, 1), "prune_rate": 0.25, "positions": "none"}


@pytest.mark.parametrize("by", ["sent", "received"])
def test_pruned_tokens_neither_send_nor_receive(by):
    """The layer on what is left of a row, its other tokens taken away."""
    s = layer({**PRUNED, "prune_by": by})
    whole = layer()
    x, ctx = tokens(s, extra=1, grid=(T,), layer_index=np.int32(1))
    ctx = with_message(ctx)
    left = np.array([0, 1, 2, 4, 6, 7, 8, 10, 11, 12])  # The first stands in front.
    kept = np.zeros((2, T + 1), np.float32)
    kept[:, left] = T / 9
    ctx = ctx.replace(carried=ctx.carried | {KEPT: kept})
    y, found = s.forward(s.arrays, x, ctx)
    _, alone = tokens(whole, hooks=PROBES)
    alone = alone.replace(
        positions=ctx.positions[:, left],
        embeddings=None,
        carried={MESSAGE: ctx.carried[MESSAGE][:, left]},
    )
    expected, records = whole.forward(s.arrays, x[:, left], alone)
    close(np.asarray(y)[:, left], expected)
    gone = np.setdiff1d(np.arange(T + 1), left)
    close(np.asarray(y)[:, gone], 0)
    weights = np.asarray(records.records["weights"])
    score = weights.sum((1, 2) if by == "sent" else (1, 3))
    after = np.asarray(found.carried[KEPT])
    close(after[:, 0], T / 9)
    for b in range(2):
        best = left[1:][np.argsort(-score[b, 1:])[:6]]
        assert set(np.flatnonzero(after[b, 1:]) + 1) == set(best)
        close(after[b, best], T / 6)


def test_the_mean_of_a_pruned_model_is_that_of_the_tokens_left():
    model = model_of(mixer={"prune": (0, 2), "prune_rate": 0.3})
    _, params, buffers, _ = deep()
    x, records, carried, _ = run(model, params, buffers, "kept", trains=False)
    first, last = (records[i]["kept"] for i in OWN)
    assert first.sum(-1).tolist() == [6, 6] and last.sum(-1).tolist() == [4, 4]
    assert np.all(first >= last) and np.all(x[~last] == 0)
    weights = np.where(last, carried[MESSAGE], 0)[..., None]
    sums = (weights * normed(model, params, records)).sum(1)
    close(np.asarray(model.pooled(params, x)), sums / 4, atol=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"selector": False, "temperature": 1.0}, "temperature belongs to selector"),
        ({"controller": False, "controller_bias": True}, "belongs to controller"),
        ({"prune_rate": 0.2}, "prune_rate belongs to prune, which is off"),
        ({"controller": False, "features": "normed"}, "features are weighed by the c"),
        ({"prune": (2, 1)}, "prune must be rising numbers"),
        ({"prune": (0, 1), "prune_rate": 0.5}, "leave tokens after every pruning"),
        ({"controller": False, "prune": (0,)}, "Use prune_by=received"),
    ],
)
def test_settings_outside_their_rule_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dependencyvit.Config(**options)


def test_prunings_that_do_not_fit_the_model_are_refused():
    with pytest.raises(UserError, match="layers from 0 to 1; got .2,"):
        layer({"prune": (2,)}).build()
    config = dependencyvit.Config(prune=(0,), prune_rate=0.9)
    with pytest.raises(UserError, match="prune leaves none of 3 tokens"):
        dependencyvit.counts(config, 3, 1)


def test_a_layer_refuses_what_it_cannot_do():
    s = layer()
    x, ctx = tokens(s)
    with pytest.raises(UserError, match="reads what layers hand on, dependencyvit_m"):
        s.call(s.arrays, x, ctx.replace(carried={}))
    blend = Hook("push", "weights", action="blend_identity")
    with pytest.raises(UserError, match="blend_identity moves shares of what a token"):
        s.call(s.arrays, x, ctx.replace(hooks=(blend,), interventions={"push": 0.5}))
    ids = np.ones(x.shape[:2], np.int32)
    behind = layer(prefix_tokens=1)
    with pytest.raises(UserError, match="documents have no tokens in front in common"):
        behind.call(behind.arrays, x, ctx.replace(segment_ids=ids))
    with pytest.raises(UserError, match="has no decode form: a token divides its"):
        s.build().init_state(2, 8)
    with pytest.raises(UserError, match="type='attention_sink_survey'"):
        layer({"output": ({"type": "attention_sink_survey"},)}).build()
    pruned = layer({"prune": (0,)})
    with pytest.raises(UserError, match="knows no documents or padding"):
        pruned.call(pruned.arrays, x, ctx.replace(segment_ids=ids))


def test_models_refuse_what_they_do_not_make_of_messages(monkeypatch):
    two = {
        name: {"type": "dependencyvit", "features": features}
        for name, features in (("one", "normed"), ("two", "none"))
    }
    with pytest.raises(UserError, match="two: hands on 'dependencyvit_message' other"):
        model_of(("one", "two"), mixers=two)
    small = {**SMALL, "layers": ["dependencyvit"]}
    del small["pool"]
    given = small | {"mixers": {"dependencyvit": {"features": "normed"}}}
    for mixers in ({}, given["mixers"]):
        config = dit.resolve({"name": "dit", **small, "mixers": mixers})
        config = schema.build(dit.Config, config)
        make = functools.partial(
            dit.DiT, config, image_size=4, channels=1, out_channels=1, num_classes=2
        )
        if mixers:
            with pytest.raises(UserError, match="dit makes no one vector of all tok"):
                make()
        else:
            assert make().carried[MESSAGE].weighs == "auto"
    config = {"depths": (1, 1), "embed_dim": 12, "num_heads": 2, "patch_size": 2}
    config |= {"name": "pyramid", "layers": ["dependencyvit"] * 2, "stem": "patch"}
    config = schema.build(pyramid.Config, pyramid.resolve(config))
    with pytest.raises(UserError, match="tokens are merged between stages"):
        pyramid.Pyramid(config, image_size=8, channels=1, num_classes=2)
    side = lambda config, dims, prng_key: {"side": jnp.ones((1, 9, 12))}  # noqa: E731
    monkeypatch.setattr(attention, "streams", side, raising=False)
    with pytest.raises(UserError, match="extra residual streams do not go through la"):
        model_of()
