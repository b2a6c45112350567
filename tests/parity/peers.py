"""Comparing a language model with its counterpart in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.conversion import rules
from attnjax.core import schema
from attnjax.core.context import Context
from attnjax.decoding.generation import generate
from attnjax.decoding.sampling import Sampler
from attnjax.models import lm
from attnjax.training.transfer import all_named

VOCABULARY = 61
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_id=None,
    # A padding token has no gradient there.
    pad_token_id=None,
)


def weights(shape, seed=3):
    """What outputs are weighted with, so that gradients say something of each."""
    noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return noise / (shape[0] * shape[1])


def close(mine, others, name=""):
    """Finite, and equal to 1e-4 of the largest entry."""
    mine, others = np.asarray(mine), np.asarray(others)
    assert np.isfinite(others).all(), f"{name}: theirs is not finite"
    bound = 1e-4 * max(np.abs(others).max(), 1e-3)
    np.testing.assert_allclose(mine, others, rtol=0, atol=bound, err_msg=name)


def build(config):
    """The model of a `config.model` for the vocabulary of these tests."""
    resolved = lm.resolve({"max_len": 32} | config)
    return lm.LM(schema.build(lm.Config, resolved), VOCABULARY)


def filled(model, table, tensors):
    """The params of a model, of their tensors."""
    arrays = {}
    for rule in table:
        assert tensors[rule.theirs].shape == rule.shape, rule.theirs
        arrays |= rule.split(tensors[rule.theirs])
    return jax.tree.map(jnp.asarray, rules.tree(model, arrays, np.float32))


def logits_and_gradients(model, params, buffers, ids):
    """Logits [B, T, V], and the gradients of their weighted sum by name."""
    ctx = Context(positions=jnp.arange(ids.shape[1])[None])
    weight = weights((*ids.shape, VOCABULARY))

    @jax.jit
    def call(params):
        def loss(params):
            hidden, _ = model.hidden(params, buffers, jnp.asarray(ids), ctx)
            logits = model.logits(params, hidden)
            return jnp.sum(logits * weight), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logits), grads = call(params)
    grads = all_named(grads, model.layout)
    return np.asarray(logits), {k: np.asarray(v) for k, v in grads.items()}


def their_logits_and_gradients(torch, model, ids):
    """The same of a model of theirs."""
    model.zero_grad()
    logits = model(torch.tensor(ids)).logits
    (logits * torch.tensor(weights(logits.shape))).sum().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return logits.detach().numpy(), grads


def greedy(model, arrays, ids, count):
    """`count` new tokens a row, the likeliest each."""
    sampler = Sampler(0.0)
    rows = ids.tolist()
    return generate(model, arrays, rows, max_new_tokens=count, sampler=sampler)


def their_greedy(torch, model, ids, count, **options):
    """The same of a model of theirs."""
    new = model.generate(
        torch.tensor(ids),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        **options,
    )
    return new[:, ids.shape[1] :].tolist()
