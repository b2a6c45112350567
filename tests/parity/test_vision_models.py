"""Vision transformers against transformers: tokens, logits and gradients."""

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
from attnjax.models import vit  # noqa: E402
from attnjax.models.layout import stacked  # noqa: E402

pytestmark = pytest.mark.parity
B, SIDE, PATCH, CHANNELS, CLASSES, DEPTH = 2, 12, 4, 2, 5, 2
TINY = dict(
    hidden_size=24,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
    num_channels=CHANNELS,
)
LAYER_SCALES = ("layer_scale_mixer", "layer_scale_mlp")
OWN = dict(patch_size=PATCH, embed_dim=24, num_heads=4, num_layers=DEPTH, mlp_dim=48)


def dense(tensors, name):
    return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}


def norm(tensors, name):
    return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}


def layer(tensors, prefix, norms, scales=()):
    """One layer of ours from theirs."""
    attention = f"{prefix}.attention"
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    own = {
        "mixer": {n: dense(tensors, f"{attention}.{c}_proj") for n, c in names.items()},
        "mlp": {
            "up": dense(tensors, f"{prefix}.mlp.fc1"),
            "down": dense(tensors, f"{prefix}.mlp.fc2"),
        },
    }
    for name, theirs in zip(("norm_mixer", "norm_mlp"), norms, strict=True):
        own[name] = norm(tensors, f"{prefix}.{theirs}")
    for name, theirs in zip(LAYER_SCALES[: len(scales)], scales, strict=True):
        own[name] = tensors[f"{prefix}.{theirs}.lambda1"]
    return own


def ours(tensors, model, layers, prefix=""):
    """Our params from their tensors; a convolution's kernel is a matrix."""
    at = f"{prefix}embeddings"
    kernel = tensors[f"{at}.patch_embeddings.projection.weight"]
    params = {
        "patches": {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]),
            "bias": tensors[f"{at}.patch_embeddings.projection.bias"],
        },
        "class_token": {"table": tensors[f"{at}.cls_token"][0]},
        "position_embedding": {"table": tensors[f"{at}.position_embeddings"][0]},
        "final_norm": norm(tensors, f"{prefix}layernorm"),
        "layers": stacked(dict(enumerate(layers)), model.layout),
    }
    if f"{at}.register_tokens" in tensors:
        params["registers"] = {"table": tensors[f"{at}.register_tokens"][0]}
    return params


def tensors_of(module):
    return {name: t.detach().numpy() for name, t in module.state_dict().items()}


def make(**options):
    config = schema.build(vit.Config, vit.resolve(OWN | options))
    return vit.ViT(config, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES)


def images_of():
    rng = np.random.default_rng(5)
    return rng.normal(size=(B, SIDE, SIDE, CHANNELS)).astype(np.float32)


def same_structure(params, model):
    wanted, _ = jax.eval_shape(model.init, 0)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, wanted)


def test_a_classifier_has_their_logits_and_gradients(randomise):
    """ViTForImageClassification: class token, learned positions, no pooler."""
    settings = transformers.ViTConfig(
        **TINY, intermediate_size=48, num_labels=CLASSES, layer_norm_eps=1e-6
    )
    theirs = randomise(transformers.ViTForImageClassification(settings))
    tensors = tensors_of(theirs)
    model = make()
    norms = ("layernorm_before", "layernorm_after")
    rows = [layer(tensors, f"vit.layers.{i}", norms) for i in range(DEPTH)]
    params = ours(tensors, model, rows, "vit.")
    params["head"] = dense(tensors, "classifier")
    same_structure(params, model)
    images, weight = images_of(), weights((B, CLASSES))
    buffers = jax.jit(model.init)(0)[1]

    @jax.jit
    def call(params):
        def loss(params):
            ctx = model.context(batch=B)
            logits, _ = model.logits(params, buffers, jnp.asarray(images), ctx)
            return jnp.sum(logits * weight), logits

        return jax.grad(loss, has_aux=True)(params)

    gradient, logits = call(params)
    out = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits
    close(logits, out.detach().numpy(), "logits")
    (out * torch.from_numpy(weight)).sum().backward()
    found = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    rows = [layer(found, f"vit.layers.{i}", norms) for i in range(DEPTH)]
    wanted = ours(found, model, rows, "vit.") | {"head": dense(found, "classifier")}
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(wanted),
        strict=True,
    ):
        close(mine, other, jax.tree_util.keystr(path))


def test_tokens_with_registers_and_layer_scale_are_theirs(randomise):
    """Dinov2WithRegistersModel: class token, registers, patches, in this order."""
    settings = transformers.Dinov2WithRegistersConfig(
        **TINY, mlp_ratio=2, num_register_tokens=3
    )
    theirs = randomise(transformers.Dinov2WithRegistersModel(settings))
    tensors = tensors_of(theirs)
    model = make(registers=3, layer_scale=1.0)
    rows = [
        layer(
            tensors,
            f"encoder.layer.{i}",
            ("norm1", "norm2"),
            ("layer_scale1", "layer_scale2"),
        )
        for i in range(DEPTH)
    ]
    params = ours(tensors, model, rows)
    zero = jnp.zeros((24, CLASSES)), jnp.zeros(CLASSES)
    params["head"] = dict(zip(("kernel", "bias"), zero, strict=True))
    same_structure(params, model)
    images = images_of()
    buffers = jax.jit(model.init)(0)[1]

    @jax.jit
    def call(params):
        ctx = model.context(batch=B)
        return model.hidden(params, buffers, jnp.asarray(images), ctx)[0]

    with torch.no_grad():
        out = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    hidden = call(params)
    close(hidden, out.last_hidden_state.numpy(), "tokens")
    close(model.pooled(params, hidden), out.pooler_output.numpy(), "class token")
