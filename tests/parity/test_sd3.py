"""The multimodal diffusion transformer against diffusers' Stable Diffusion 3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
diffusers = pytest.importorskip("diffusers", reason="extra `parity` is not installed")

from peers import close, weights  # noqa: E402

from attnjax.core import schema  # noqa: E402
from attnjax.models import mmdit  # noqa: E402
from attnjax.models.layout import stacked  # noqa: E402

pytestmark = pytest.mark.parity
SIDE, PATCH, CHANNELS, DEPTH, HEADS, HEAD_DIM = 6, 2, 3, 3, 3, 8
DIM, WIDTH, LENGTH, TABLE = HEADS * HEAD_DIM, 20, 5, 7
TIMES = [0, 437, 999]


def dense(tensors, name):
    return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}


def scale_first(tensors, name):
    """A map to (scale, shift) as one to (shift, scale)."""
    halves = {k: np.split(v, 2, axis=-1) for k, v in dense(tensors, name).items()}
    return {k: np.concatenate(v[::-1], axis=-1) for k, v in halves.items()}


def attention(tensors, prefix, names, norms):
    """One stream's maps, and its norms of query and key where there are some."""
    made = {ours: dense(tensors, f"{prefix}.{theirs}") for ours, theirs in names}
    for ours, theirs in norms:
        if f"{prefix}.{theirs}.weight" in tensors:
            made[ours] = {"scale": tensors[f"{prefix}.{theirs}.weight"]}
    return made


def mlp(tensors, prefix):
    return {
        "up": dense(tensors, f"{prefix}.net.0.proj"),
        "down": dense(tensors, f"{prefix}.net.2"),
    }


def layer(tensors, i):
    """One layer of ours from theirs; the last one's text has keys and values alone."""
    own = f"transformer_blocks.{i}"
    image = [("query", "to_q"), ("key", "to_k"), ("value", "to_v")]
    image.append(("out", "to_out.0"))
    text = [(ours, f"add_{ours[0]}_proj") for ours in ("query", "key", "value")]
    is_last = i == DEPTH - 1
    if not is_last:
        text.append(("out", "to_add_out"))
    own_norms = [("query_norm", "norm_q"), ("key_norm", "norm_k")]
    added = [("query_norm", "norm_added_q"), ("key_norm", "norm_added_k")]
    made = {
        "image": {
            "mixer": attention(tensors, f"{own}.attn", image, own_norms),
            "mlp": mlp(tensors, f"{own}.ff"),
            "modulation": {"linear": dense(tensors, f"{own}.norm1.linear")},
        },
        "text": {"mixer": attention(tensors, f"{own}.attn", text, added)},
    }
    told = f"{own}.norm1_context.linear"
    if is_last:
        made["text"]["modulation"] = {"linear": scale_first(tensors, told)}
    else:
        made["text"]["modulation"] = {"linear": dense(tensors, told)}
        made["text"]["mlp"] = mlp(tensors, f"{own}.ff_context")
    return made


def ours(tensors, model):
    """Our params from their tensors, without an encoder of text."""
    kernel = tensors["pos_embed.proj.weight"]
    told = "time_text_embed"
    first = {i: layer(tensors, i) for i in range(DEPTH)}
    return {
        "patches": {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, DIM),
            "bias": tensors["pos_embed.proj.bias"],
        },
        "time": {
            "hidden": dense(tensors, f"{told}.timestep_embedder.linear_1"),
            "out": dense(tensors, f"{told}.timestep_embedder.linear_2"),
        },
        "pooled": {
            "hidden": dense(tensors, f"{told}.text_embedder.linear_1"),
            "out": dense(tensors, f"{told}.text_embedder.linear_2"),
        },
        "context": dense(tensors, "context_embedder"),
        "final_modulation": {"linear": scale_first(tensors, "norm_out.linear")},
        "head": dense(tensors, "proj_out"),
        "layers": stacked(first, model.layout),
    }


def make_both(qk_norm, randomise):
    theirs = randomise(
        diffusers.SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=PATCH,
            in_channels=CHANNELS,
            num_layers=DEPTH,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            caption_projection_dim=DIM,
            pooled_projection_dim=WIDTH,
            out_channels=CHANNELS,
            pos_embed_max_size=TABLE,
            qk_norm=qk_norm,
        )
    )
    settings = mmdit.resolve(
        dict(
            patch_size=PATCH,
            embed_dim=DIM,
            num_heads=HEADS,
            num_layers=DEPTH,
            qk_norm=qk_norm is not None,
            positions_grid=TABLE,
            positions_step=SIDE / PATCH / TABLE,
            text={"embed_dim": WIDTH, "max_len": LENGTH},
        )
    )
    model = mmdit.MMDiT(
        schema.build(mmdit.Config, settings),
        image_size=SIDE,
        channels=CHANNELS,
        out_channels=CHANNELS,
    )
    return theirs, model


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_the_network_has_their_output_and_gradients(qk_norm, randomise):
    """Two streams, joint attention, the silent text of the last layer, and places from
    the middle of a table."""
    theirs, model = make_both(qk_norm, randomise)
    tensors = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}
    params = ours(tensors, model)
    wanted, buffers = jax.eval_shape(model.init, 0)
    del wanted["text_encoder"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, wanted)
    rng = np.random.default_rng(5)
    count = len(TIMES)
    images = rng.normal(size=(count, SIDE, SIDE, CHANNELS)).astype(np.float32)
    features = rng.normal(size=(count, LENGTH, WIDTH)).astype(np.float32)
    pooled = rng.normal(size=(count, WIDTH)).astype(np.float32)
    weight = weights(images.shape)
    encoder = jax.eval_shape(model.init, 0)[0]["text_encoder"]
    unused = jax.tree.map(lambda a: jnp.zeros(a.shape), encoder)

    @jax.jit
    def call(params):
        def loss(params):
            ctx = model.context(batch=count)
            times = jnp.asarray(TIMES, jnp.float32)
            found, _ = model.denoise(
                params | {"text_encoder": unused},
                buffers,
                images,
                times,
                (features, pooled, None),
                ctx,
            )
            return jnp.sum(found * weight), found

        return jax.grad(loss, has_aux=True)(params)

    gradient, found = call(params)
    out = theirs(
        torch.from_numpy(images.transpose(0, 3, 1, 2)),
        encoder_hidden_states=torch.from_numpy(features),
        pooled_projections=torch.from_numpy(pooled),
        timestep=torch.tensor(TIMES),
    ).sample
    for row, other in enumerate(out.detach().numpy().transpose(0, 2, 3, 1)):
        close(found[row], other, f"t={TIMES[row]}")
    (out * torch.from_numpy(weight.transpose(0, 3, 1, 2))).sum().backward()
    # The queries of the last layer's text have no gradient there, and zeros here.
    grads = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in theirs.named_parameters()
    }
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(ours(grads, model)),
        strict=True,
    ):
        close(mine, other, jax.tree_util.keystr(path))
