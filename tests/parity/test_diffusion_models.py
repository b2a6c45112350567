"""Diffusion transformers against diffusers: the network's output and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
diffusers = pytest.importorskip("diffusers", reason="extra `parity` is not installed")

from peers import close, weights  # noqa: E402

from attnjax.core import schema  # noqa: E402
from attnjax.models import dit  # noqa: E402
from attnjax.models.layout import stacked  # noqa: E402

pytestmark = pytest.mark.parity
SIDE, PATCH, CHANNELS, CLASSES, DEPTH, HEADS, HEAD_DIM = 6, 2, 3, 5, 2, 3, 8
DIM = HEADS * HEAD_DIM
# Both ends of the chain, and a class beside the row of none.
TIMES, LABELS = [0, 1, 437, 999], [4, CLASSES, 0, CLASSES]


def dense(tensors, name):
    return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}


def layer(tensors, prefix):
    """One layer of ours from theirs."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    return {
        "mixer": {n: dense(tensors, f"{prefix}.attn1.{c}") for n, c in names.items()},
        "mlp": {
            "up": dense(tensors, f"{prefix}.ff.net.0.proj"),
            "down": dense(tensors, f"{prefix}.ff.net.2"),
        },
        "modulation": {"linear": dense(tensors, f"{prefix}.norm1.linear")},
    }


def ours(tensors, model):
    """Our params from their tensors; a convolution's kernel is a matrix."""
    kernel = tensors["pos_embed.proj.weight"]
    # Each of their layers has time and classes; they are the same in all of them.
    told = "transformer_blocks.0.norm1.emb"
    rows = {i: layer(tensors, f"transformer_blocks.{i}") for i in range(DEPTH)}
    return {
        "patches": {
            "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, DIM),
            "bias": tensors["pos_embed.proj.bias"],
        },
        "time": {
            "hidden": dense(tensors, f"{told}.timestep_embedder.linear_1"),
            "out": dense(tensors, f"{told}.timestep_embedder.linear_2"),
        },
        "classes": {"table": tensors[f"{told}.class_embedder.embedding_table.weight"]},
        "final_modulation": {"linear": dense(tensors, "proj_out_1")},
        "head": dense(tensors, "proj_out_2"),
        "layers": stacked(rows, model.layout),
    }


def make_theirs(randomise):
    """DiTTransformer2DModel with weights everywhere, and the released frequencies."""
    theirs = randomise(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=DEPTH,
            sample_size=SIDE,
            patch_size=PATCH,
            num_embeds_ada_norm=CLASSES,
            attention_bias=True,
            # Of the norm in front of the MLP alone; 1e-6 is fixed elsewhere.
            norm_eps=1e-6,
        )
    )
    told = theirs.transformer_blocks[0].norm1.emb
    # They divide the exponents by 127; the released code and ours divide by 128.
    assert told.time_proj.downscale_freq_shift == 1
    told.time_proj.downscale_freq_shift = 0
    for block in theirs.transformer_blocks:
        block.norm1.emb = told
    return theirs


def test_the_network_has_their_output_and_gradients(randomise):
    """adaLN-Zero, positions and patches; gates and head away from their zeros."""
    theirs = make_theirs(randomise)
    settings = dit.resolve(
        dict(patch_size=PATCH, embed_dim=DIM, num_heads=HEADS, num_layers=DEPTH)
    )
    model = dit.DiT(
        schema.build(dit.Config, settings),
        image_size=SIDE,
        channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_classes=CLASSES,
    )
    tensors = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}
    params = ours(tensors, model)
    wanted, buffers = jax.eval_shape(model.init, 0)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, wanted)
    assert not jax.tree.leaves(buffers)
    rng = np.random.default_rng(5)
    images = rng.normal(size=(len(TIMES), SIDE, SIDE, CHANNELS)).astype(np.float32)
    weight = weights((len(TIMES), SIDE, SIDE, 2 * CHANNELS))

    @jax.jit
    def call(params):
        def loss(params):
            ctx = model.context(batch=len(TIMES))
            times, labels = jnp.asarray(TIMES, jnp.float32), jnp.asarray(LABELS)
            found, _ = model.predict(params, buffers, images, times, labels, ctx)
            return jnp.sum(found * weight), found

        return jax.grad(loss, has_aux=True)(params)

    gradient, found = call(params)
    out = theirs(
        torch.from_numpy(images.transpose(0, 3, 1, 2)),
        timestep=torch.tensor(TIMES),
        class_labels=torch.tensor(LABELS),
    ).sample
    # Each row by itself: a time or a label of its own.
    for row, other in enumerate(out.detach().numpy().transpose(0, 2, 3, 1)):
        close(found[row], other, f"t={TIMES[row]}, label={LABELS[row]}")
    (out * torch.from_numpy(weight.transpose(0, 3, 1, 2))).sum().backward()
    named = theirs.named_parameters()
    wanted = ours({name: p.grad.numpy() for name, p in named}, model)
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(wanted),
        strict=True,
    ):
        close(mine, other, jax.tree_util.keystr(path))
