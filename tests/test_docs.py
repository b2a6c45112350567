"""The code of docs/adding_a_mechanism.md is a mechanism that works."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import conformance
from attnjax.core import discovery, entries
from attnjax.core.context import Context
from attnjax.core.spec import MixerDims
from attnjax.models import lm

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_mechanism.md"
DIMS = MixerDims(embed_dim=7, num_heads=1, num_kv_heads=1, head_dim=7)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.M)
    path = tmp_path_factory.mktemp("mechanism") / "decayed_average.py"
    path.write_text(code)
    return str(path)


@pytest.fixture(scope="module")
def mechanism(path):
    return discovery.find(path)


def test_the_example_is_a_catalog_entry(mechanism):
    entry = entries.entry(mechanism)
    assert entry["config"][0]["doc"] == "a of every channel at the start, in (0, 1)."
    assert entry["example"]["parameters"] == 3 * 512 * 512 + 512


def test_the_fast_form_is_the_reference_with_documents_and_padding(mechanism):
    value = jax.random.normal(jax.random.key(0), (2, 11, 3))
    decay = jnp.array([0.1, 0.5, 0.95])
    ids = jnp.array([[1] * 4 + [2] * 5 + [0] * 2, [3] + [0] * 2 + [3] * 8])
    state = mechanism.State(jnp.zeros((2, 3)), jnp.zeros((2,), jnp.int32))
    out, _ = jax.jit(mechanism.parallel)(value, decay, ids, state)
    np.testing.assert_allclose(
        out, mechanism.reference(value, decay, ids), rtol=1e-5, atol=1e-6
    )


def test_the_definition_is_the_recurrence(mechanism):
    value = np.random.default_rng(0).normal(size=(1, 5, 2))
    decay, mean, rows = np.array([0.3, 0.8]), np.zeros(2), []
    for row in value[0]:
        mean = decay * mean + (1 - decay) * row
        rows.append(mean)
    with jax.enable_x64(True):
        out = mechanism.reference(jnp.asarray(value), jnp.asarray(decay))
    np.testing.assert_allclose(out[0], rows, rtol=1e-12)


def test_decoding_in_pieces_is_the_full_pass(mechanism):
    mixer = mechanism.Mixer(mechanism.Config(), DIMS, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 7))
    positions = jnp.arange(9)[None]
    step = jax.jit(mixer.step)
    whole, _ = jax.jit(mixer)(x, Context(positions=positions))
    state, pieces = mixer.init_state(2, 9), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        ctx = Context(positions=positions[:, start:stop])
        y, state = step(x[:, start:stop], state, ctx)
        pieces.append(y)
    np.testing.assert_allclose(
        jnp.concatenate(pieces, axis=1), whole, rtol=1e-5, atol=1e-6
    )


def test_the_example_passes_the_suite_of_every_mixer(path):
    report = conformance.run(path)
    assert report.passed, str(report)


def test_the_example_is_a_layer_of_a_model(path):
    options = {"layers": "mine", "num_layers": 2, "mixers": {"mine": {"type": path}}}
    config = lm.resolve({**options, "embed_dim": 8, "num_heads": 2})
    assert config["mixers"]["mine"] == {"type": path, "initial_decay": 0.9}


def test_the_example_refuses_what_it_says(mechanism):
    with pytest.raises(ValueError, match=r"initial_decay must be in \(0, 1\); got 1"):
        mechanism.Config(initial_decay=1.0)
