"""SwinV2 against transformers: states of every stage, logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
transformers = pytest.importorskip(
    "transformers", reason="extra `parity` is not installed"
)

from peers import close, weights  # noqa: E402

from attnjax.core import schema  # noqa: E402
from attnjax.core.context import Hook  # noqa: E402
from attnjax.models import pyramid  # noqa: E402
from attnjax.models.layout import stacked  # noqa: E402

pytestmark = pytest.mark.parity
B, SIDE, PATCH, CHANNELS, CLASSES = 2, 24, 4, 2, 5
DIM, HEADS, DEPTHS = 12, (2, 3), (2, 2)
# Grids of 6 and 3 places: four windows that can be shifted, and one that cannot. The
# offsets of the second stage are those of larger windows.
WINDOW, BEFORE = 3, 6


def dense(tensors, name):
    found = {"kernel": tensors[f"{name}.weight"].T}
    if f"{name}.bias" in tensors:
        found["bias"] = tensors[f"{name}.bias"]
    return found


def norm(tensors, name):
    return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}


def layer(tensors, prefix):
    """One layer of ours from theirs."""
    own = f"{prefix}.attention.self"
    mixer = {
        name: dense(tensors, f"{own}.{name}") for name in ("query", "key", "value")
    }
    mixer["out"] = dense(tensors, f"{prefix}.attention.output.dense")
    mixer["logit_scale"] = tensors[f"{own}.logit_scale"].reshape(-1)
    for name, place in (("bias_in", 0), ("bias_out", 2)):
        mixer[name] = dense(tensors, f"{own}.continuous_position_bias_mlp.{place}")
    return {
        "mixer": mixer,
        "mlp": {
            "up": dense(tensors, f"{prefix}.intermediate.dense"),
            "down": dense(tensors, f"{prefix}.output.dense"),
        },
        "post_norm_mixer": norm(tensors, f"{prefix}.layernorm_before"),
        "post_norm_mlp": norm(tensors, f"{prefix}.layernorm_after"),
    }


def ours(tensors, model):
    """Our params from their tensors; a convolution's kernel is a matrix."""
    at = "swinv2.embeddings"
    kernel = tensors[f"{at}.patch_embeddings.projection.weight"]
    merge = "swinv2.encoder.layers.0.downsample"
    # Columns of places go first there, rows here.
    merged = tensors[f"{merge}.reduction.weight"].T.reshape(2, 2, DIM, -1)
    places = [(i, j) for i, depth in enumerate(DEPTHS) for j in range(depth)]
    rows = [layer(tensors, f"swinv2.encoder.layers.{i}.blocks.{j}") for i, j in places]
    return {
        "stem": {
            "conv_0": {
                "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, DIM),
                "bias": tensors[f"{at}.patch_embeddings.projection.bias"],
            },
            "norm_0": norm(tensors, f"{at}.norm"),
        },
        "downsampling": {
            "conv_1": {"kernel": merged.swapaxes(0, 1).reshape(4 * DIM, -1)},
            "norm_1": norm(tensors, f"{merge}.norm"),
        },
        "layers": stacked(dict(enumerate(rows)), model.layout),
        "final_norm": norm(tensors, "swinv2.layernorm"),
        "head": dense(tensors, "classifier"),
    }


def make():
    """The model, every second layer shifted."""
    first = {"type": "swin_v2", "window": WINDOW}
    second = first | {"bias_window": BEFORE}
    config = pyramid.resolve(
        dict(
            layers=("first first_shifted", "second second_shifted"),
            mixers={
                "first": first,
                "first_shifted": first | {"shifted": True},
                "second": second,
                "second_shifted": second | {"shifted": True},
            },
            depths=DEPTHS,
            embed_dim=DIM,
            heads=HEADS,
            mlp_dim=2 * DIM,
            patch_size=PATCH,
            downsampling="merge",
            post_norm="only",
            norm_eps=1e-5,
            pool="norm_mean",
        )
    )
    config = schema.build(pyramid.Config, config)
    return pyramid.Pyramid(
        config, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES
    )


def theirs_of(randomise):
    settings = transformers.Swinv2Config(
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=CHANNELS,
        embed_dim=DIM,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        pretrained_window_sizes=(0, BEFORE),
        mlp_ratio=2.0,
        num_labels=CLASSES,
    )
    model = randomise(transformers.Swinv2ForImageClassification(settings))
    with torch.no_grad():
        for i, scale in ((0, 3.0), (1, 5.3)):  # The second is over ln 100.
            attention = model.swinv2.encoder.layers[i].blocks[0].attention.self
            attention.logit_scale[1] = scale
    return model


def test_a_classifier_has_their_states_logits_and_gradients(randomise):
    """Swinv2ForImageClassification: windows, shifts, merging, norms behind."""
    theirs, model = theirs_of(randomise), make()
    named = theirs.state_dict()
    params = ours({name: t.numpy().copy() for name, t in named.items()}, model)
    wanted, _ = jax.eval_shape(model.init, 0)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, wanted)
    rng, weight = np.random.default_rng(5), weights((B, CLASSES))
    images = rng.normal(size=(B, SIDE, SIDE, CHANNELS)).astype(np.float32)
    buffers = jax.jit(model.init)(0)[1]

    @jax.jit
    def call(params):
        def loss(params):
            ctx = model.context(batch=B).replace(hooks=(Hook("states", "hidden"),))
            logits, out = model.logits(params, buffers, jnp.asarray(images), ctx)
            return jnp.sum(logits * weight), (logits, out.records)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (logits, records) = call(params)
    states = []
    for stage in theirs.swinv2.encoder.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda m, given, out: states.append(out[0]))
    out = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits
    assert len(states) == len(records) == sum(DEPTHS)
    for i, state in enumerate(states):
        close(records[i]["states"], state.detach().numpy(), f"layer {i}")
    close(logits, out.detach().numpy(), "logits")
    (out * torch.from_numpy(weight)).sum().backward()
    found = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(ours(found, model)),
        strict=True,
    ):
        close(mine, other, jax.tree_util.keystr(path))
