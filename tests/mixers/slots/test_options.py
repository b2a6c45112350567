"""Options of mechanisms in the slots of attention, from files of their own."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax.conformance import samples
from attnjax.conformance.checks import decoding
from attnjax.conformance.subject import BASE_DIMS, subject
from attnjax.core.errors import UserError
from attnjax.mixers import attention
from attnjax.mixers.slots import options
from attnjax.mixers.slots.base import Heads

B, T, C, H, K, D = 2, 13, 20, 6, 3, 4

# Neighbouring heads are subtracted, a quadratic penalty is added to the scores, and a
# loss is left: sizes, kernel spec, parameters and reports of a slot at once.
SUBTRACT = '''
    """Subtract the second head of each pair from the first."""
    import dataclasses
    import jax
    import jax.numpy as jnp
    from attnjax import kernels, nn
    from attnjax.core.spec import Capabilities, Decode, MixerSpec
    from attnjax.mixers import attention
    from attnjax.mixers.slots import base

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Settings.

        Attributes:
            strength: of the penalty on distance.
        """
        strength: float = 0.1

    def penalty(s, b, h, q, k, strength):
        return s - strength * (q - k) ** 2

    class Slot(base.Slot):
        hooks = ("lambda",)

        def __init__(self, config, heads, dims, *, rngs):
            ones = jax.nn.initializers.ones
            self.strength = config.strength
            self.weight = nn.param(rngs, (heads.num_heads // 2,), ones,
                                   dtype=jnp.dtype(dims.param_dtype))

        @staticmethod
        def heads_after(config, heads):
            return dataclasses.replace(heads, num_heads=heads.num_heads // 2)

        @staticmethod
        def parameter_count(config, heads, dims):
            return heads.num_heads // 2

        @staticmethod
        def flops(config, heads, dims, seq_len):
            return 0.0

        def attend(self, x, spec, operands, call):
            step = kernels.ScoreFn(penalty, ("strength",), ("head",))
            strength = jnp.full((1,), self.strength, jnp.float32)
            spec = dataclasses.replace(spec, score=(*spec.score, step))
            return spec, {**operands, "strength": strength}

        def heads(self, x, heads, call):
            weight = call.probe("lambda", self.weight[...][None, None], head_axis=2)
            call.losses["size"] = 0.01 * jnp.sum(self.weight[...] ** 2)
            weight = weight[..., None].astype(heads.dtype)
            return heads[:, :, ::2] - weight * heads[:, :, 1::2]

    def preset(config):
        return attention.Config(output=({"type": __file__, "strength":
                                         config.strength},))

    def reference():
        """Nothing to read."""

    SPEC = MixerSpec(
        name="subtract", title="Subtraction", family="toy", paper="", source="",
        forms=("parallel",), capabilities=Capabilities(), decode=Decode(),
        parameter_count=lambda c, d: attention.SPEC.parameter_count(preset(c), d),
        state_size=lambda c, d, n: attention.SPEC.state_size(preset(c), d, n),
        flops=lambda c, d, n: attention.SPEC.flops(preset(c), d, n))
'''


@pytest.fixture(scope="module")
def subtract(tmp_path_factory):
    """The path of a mechanism outside the package."""
    path = tmp_path_factory.mktemp("mechanisms") / "subtract.py"
    path.write_text(textwrap.dedent(SUBTRACT))
    return str(path)


def layer(*entries, **config):
    return subject(attention, {"output": list(entries), **config})


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def test_a_file_outside_the_package_fills_slots(subtract):
    s = layer({"type": subtract, "strength": 0.2}, positions="none")
    x, ctx = samples.sample(s)
    params = s.arrays[0]
    assert params["out"]["kernel"].shape == (H // 2 * D, C)
    y, out = s.forward(s.arrays, x, ctx)
    split = lambda name: (x @ params[name]["kernel"]).reshape(B, T, -1, D)  # noqa: E731
    query, key, value = (np.asarray(split(n)) for n in ("query", "key", "value"))
    key, value = (np.repeat(a, H // K, axis=2) for a in (key, value))
    t, s_ = np.indices((T, T))
    scores = np.einsum("bthd,bshd->bhts", query, key) / 2 - 0.2 * (t - s_) ** 2
    weights = np.exp(np.where(s_ <= t, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bhts,bshd->bthd", weights, value)
    weight = np.asarray(params["slot_subtract"]["weight"])
    mixed = heads[:, :, ::2] - weight[:, None] * heads[:, :, 1::2]
    close(y, mixed.reshape(B, T, -1) @ params["out"]["kernel"])
    close(out.losses["size"], 0.01 * np.sum(weight**2))


def test_options_compose_and_see_the_sizes_before_them(subtract):
    """Six heads, three after one subtraction: the gate has three heads."""
    gate = {"type": "gated_attention", "granularity": "headwise"}
    after = layer({"type": subtract}, gate)
    before = layer(gate, {"type": subtract})
    kernel = lambda s: s.arrays[0]["slot_gated_attention"]["gate"]["kernel"]  # noqa: E731
    assert kernel(after).shape == (C, H // 2) and kernel(before).shape == (C, H)
    for s in (after, before):
        x, ctx = samples.sample(s, "packed")
        valid = ctx.segment_ids != 0
        y = decoding.decode(s, x, ctx, (5, 1, 7), max_len=T)
        close(y[valid], s.y(x, ctx)[valid])


def test_spec_counts_options(subtract):
    config = attention.Config(
        output=({"type": subtract}, {"type": "gated_attention"}), num_kv_heads=2
    )
    mixer = nnx.eval_shape(lambda: attention.Mixer(config, BASE_DIMS, rngs=nnx.Rngs(0)))
    built = sum(p.size for p in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    assert attention.SPEC.parameter_count(config, BASE_DIMS) == built
    plain = attention.Config(num_kv_heads=2)
    told = [attention.SPEC.flops(c, BASE_DIMS, T) for c in (plain, config)]
    # The output map reads half of the heads, and the gate has half of them.
    half = 2 * T * C * (H // 2 * D)
    assert told[1] == told[0] - half + half


def test_equal_options_have_names_of_their_own():
    gates = [{"type": "gated_attention", "position": p} for p in ("g1", "g2", "g3")]
    found = options.resolve(tuple(gates), Heads(H, K, D, D))
    assert [option.name for option in found] == [
        "slot_gated_attention",
        "slot_gated_attention_2",
        "slot_gated_attention_3",
    ]


def test_shared_parameters_start_equal_with_and_without_options():
    from attnjax import nn

    made = {}
    for name, output in (("plain", ()), ("gated", ({"type": "gated_attention"},))):
        config = attention.Config(output=output)
        mixer = attention.Mixer(config, BASE_DIMS, rngs=nnx.Rngs(0))
        made[name] = nn.materialize(mixer, jax.random.key(1))
    extra = made["gated"].pop("slot_gated_attention")
    jax.tree.map(np.testing.assert_array_equal, made["plain"], made["gated"])
    assert jnp.std(extra["gate"]["kernel"]) > 0


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"position": "g1"}, "needs a type, the name of a mechanism"),
        (
            {"type": "gated_atention"},
            "unknown mixer 'gated_atention'. Did you mean gat",
        ),
        ({"type": "linear_attention"}, "must name a mechanism with a Slot; got type="),
        ({"type": "gated_attention", "postion": "g1"}, "postion"),
        ({"type": "gated_attention", "position": "g6"}, "g6"),
        ({"type": "gated_attention", "average": "logits"}, "average goes with shared"),
    ],
)
def test_entries_that_make_no_option_are_refused(entry, text):
    config = attention.Config(output=({"type": "gated_attention"}, entry))
    with pytest.raises(UserError, match=text) as error:
        attention.Mixer(config, BASE_DIMS, rngs=nnx.Rngs(0))
    assert str(error.value).startswith("attention.output[1]")
