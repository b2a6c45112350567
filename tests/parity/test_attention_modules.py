"""Single attention layers against PyTorch: output, gradients, decoding in steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
transformers = pytest.importorskip(
    "transformers", reason="extra `parity` is not installed"
)

from peers import close, weights  # noqa: E402

from attnjax import nn  # noqa: E402
from attnjax.conversion import rules  # noqa: E402
from attnjax.conversion.rules import Row, linear, norm  # noqa: E402
from attnjax.core.context import Context  # noqa: E402
from attnjax.core.spec import MixerDims  # noqa: E402
from attnjax.mixers import attention, talking_heads  # noqa: E402

pytestmark = pytest.mark.parity
B, T, C, H, K, D = 2, 11, 20, 4, 2, 6
DIMS = MixerDims(C, H, K, D, rope=nn.Rope(theta=500.0))
ROPE = {"rope_type": "default", "rope_theta": 500.0}
SIZES = dict(
    hidden_size=C,
    num_attention_heads=H,
    num_key_value_heads=K,
    head_dim=D,
    rope_parameters=ROPE,
    attn_implementation="eager",
)
MAPS = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
ROWS = tuple(row for theirs, ours in MAPS for row in linear(f"{theirs}_proj", ours))


def causal(window=None):
    """What a query sees, as they add it to scores: [1, 1, T, T]."""
    lags = torch.arange(T)[:, None] - torch.arange(T)[None]
    seen = (lags >= 0) & (lags < (window or T))
    least = torch.finfo(torch.float32).min
    return torch.zeros(T, T).masked_fill(~seen, least)[None, None]


def with_angles(module, rotary, mask):
    """x -> their output."""

    def call(x):
        positions = torch.arange(T)[None]
        return module(x, rotary(x, positions), attention_mask=mask)[0]

    return call


def gpt_oss(window):
    from transformers.models.gpt_oss import modeling_gpt_oss as kit

    kind = "full_attention" if window is None else "sliding_attention"
    config = transformers.GptOssConfig(
        **SIZES,
        attention_bias=True,
        sliding_window=window,
        layer_types=[kind],
        num_hidden_layers=1,
    )
    module = kit.GptOssAttention(config, 0)
    # Only a whole model of theirs gives these numbers.
    torch.nn.init.zeros_(module.sinks)
    return module, with_angles(
        module, kit.GptOssRotaryEmbedding(config), causal(window)
    )


def doge():
    from transformers.models.doge import modeling_doge as kit

    module = kit.DogeAttention(transformers.DogeConfig(**SIZES), 0)
    rotary = kit.DogeRotaryEmbedding(module.config)
    return module, with_angles(module, rotary, causal())


def x_transformers(**options):
    kit = pytest.importorskip(
        "x_transformers.x_transformers", reason="extra `parity` is not installed"
    )
    # Query head i shares key head i % K there and i // (H / K) here: K = H.
    module = kit.Attention(C, heads=H, dim_head=D, causal=True, **options)

    def call(x):
        found = module(x)
        return found[0] if isinstance(found, tuple) else found

    return module, call


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        make: () -> their module and how it is called.
        options: our `Config`.
        rows: which of their tensors are which of our arrays.
        zero: their tensors that ours has no counterpart of, and that do nothing at 0.
        has_rope: whether queries and keys are turned.
        mechanism: our module.
        added: their tensors that are added to the identity, as ours are not.
    """

    make: Callable[[], tuple]
    options: dict[str, Any]
    rows: tuple[Row, ...] = ROWS
    zero: tuple[str, ...] = ()
    has_rope: bool = True
    mechanism: Any = attention
    added: tuple[str, ...] = ()

    def tensor(self, rule, named) -> np.ndarray:
        """Their tensor of a rule; a convolution over single places is a matrix."""
        found = named[rule.theirs].detach().numpy().reshape(rule.shape)
        return found + np.eye(len(found)) if rule.theirs in self.added else found


SINK = (*ROWS, Row("sinks", ("sink",)))
BIASES = {"qkv_bias": True, "out_bias": True}
X_ROWS = tuple(
    Row(f"to_{theirs}.weight", (f"{ours}/kernel",), True)
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
)
X_GATE = (*X_ROWS, *linear("to_v_gate", "slot_gated_attention/gate"))
X_HEAD_GATE = (*X_ROWS, *linear("to_v_head_gate", "slot_gated_attention/gate"))
GATE = {"type": "gated_attention"}
PRE, POST = (
    Row(f"attend.{when}_softmax_talking_heads.weight", (f"{when}_map",), True)
    for when in ("pre", "post")
)


def talking(pre: bool, post: bool) -> Case:
    """Heads that talk, as in x-transformers, where P_l is added to the scores."""
    return Case(
        lambda: x_transformers(pre_talking_heads=pre, post_talking_heads=post),
        {"num_kv_heads": H, "pre": pre, "post": post, "block": 4},
        (*X_ROWS, *(row for row, on in ((PRE, pre), (POST, post)) if on)),
        has_rope=False,
        mechanism=talking_heads,
        added=(PRE.theirs,),
    )


CASES = {
    "sink logits as in GPT-OSS": Case(
        lambda: gpt_oss(None), {"weight_map": "sink_logit", **BIASES}, SINK
    ),
    "sink logits in a window": Case(
        lambda: gpt_oss(4), {"weight_map": "sink_logit", "window": 4, **BIASES}, SINK
    ),
    # At A = 0 its dynamic mask is one number everywhere.
    "normed queries and keys as in Doge": Case(
        doge,
        {"qk_norm": True},
        (*ROWS, *norm("q_norm", "query_norm"), *norm("k_norm", "key_norm")),
        ("A", "dt_proj.weight"),
    ),
    "x-transformers, gated": Case(
        lambda: x_transformers(gate_values=True),
        {"num_kv_heads": H, "output": (GATE,)},
        X_GATE,
        has_rope=False,
    ),
    "x-transformers, gated by SiLU": Case(
        lambda: x_transformers(gate_values=True, swiglu_values=True),
        {"num_kv_heads": H, "output": (GATE | {"activation": "silu"},)},
        X_GATE,
        has_rope=False,
    ),
    "x-transformers, heads gated": Case(
        lambda: x_transformers(gate_values=True, gate_values_headwise=True),
        {"num_kv_heads": H, "output": (GATE | {"granularity": "headwise"},)},
        X_GATE,
        has_rope=False,
    ),
    "x-transformers, heads gated with a bias": Case(
        lambda: x_transformers(gate_value_heads=True),
        {"num_kv_heads": H, "output": (GATE | {"granularity": "headwise"},)},
        X_HEAD_GATE,
        ("to_v_head_gate.bias",),
        has_rope=False,
    ),
    "x-transformers, heads talk": talking(True, True),
    "x-transformers, scores talk": talking(True, False),
    "x-transformers, weights talk": talking(False, True),
}


class Pair:
    """A layer of theirs and ours with the same numbers, on the same input."""

    def __init__(self, case, randomise):
        self.module, self.call = case.make()
        randomise(self.module, scale=0.4)
        named = dict(self.module.named_parameters())
        with torch.no_grad():
            for name in case.zero:
                named[name].zero_()
        positions = "inherit" if case.has_rope else "none"
        config = case.mechanism.Config(positions=positions, **case.options)
        mixer = case.mechanism.Mixer(config, DIMS, rngs=nnx.Rngs(0))
        self.graph, params = nnx.split(mixer, nnx.Param)
        flat = nnx.to_flat_state(params)
        shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in flat}
        self.rules = rules.rules(case.rows, shapes)
        assert {rule.theirs for rule in self.rules} == set(named) - set(case.zero)
        arrays = {}
        for rule in self.rules:
            arrays |= rule.split(case.tensor(rule, named).astype(np.float32))
        self.paths = {"/".join(map(str, path)): path for path, _ in flat}
        self.params = nn.parameter.nest(
            (path, jnp.asarray(arrays[name])) for name, path in self.paths.items()
        )
        self.x = np.random.default_rng(2).normal(size=(B, T, C)).astype(np.float32)

    def theirs(self):
        """Their output, and the gradients of its weighted sum by name."""
        x = torch.tensor(self.x, requires_grad=True)
        y = self.call(x)
        (y * torch.tensor(weights(y.shape))).sum().backward()
        grads = {n: p.grad.numpy() for n, p in self.module.named_parameters()}
        return y.detach().numpy(), grads | {"x": x.grad.numpy()}

    def mixer(self, params):
        return nnx.merge(self.graph, params)


@pytest.fixture(scope="module", params=CASES)
def pair(request, randomise):
    return Pair(CASES[request.param], randomise)


def at(first, count):
    return Context(positions=jnp.arange(first, first + count)[None])


def test_output_and_gradients_are_theirs(pair):
    y, theirs = pair.theirs()
    weight = weights(y.shape)

    @jax.jit
    def call(params, x):
        def loss(params, x):
            mine, _ = pair.mixer(params)(x, at(0, T))
            return jnp.sum(mine * weight), mine

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, mine), (grads, of_x) = call(pair.params, pair.x)
    close(mine, y, "output")
    close(of_x, theirs["x"], "x")
    found = {}
    for name, path in pair.paths.items():
        leaf = grads
        for key in path:
            leaf = leaf[key]
        found[name] = np.asarray(leaf)
    for rule in pair.rules:
        grad = theirs[rule.theirs].reshape(rule.shape)
        close(rule.join(found), grad, rule.theirs)


def test_decoding_in_steps_is_their_output(pair):
    with torch.no_grad():
        y = pair.call(torch.tensor(pair.x)).numpy()

    @jax.jit
    def call(params, x):
        mixer = pair.mixer(params)
        state, parts, first = mixer.init_state(B, T), [], 0
        for count in (6, 1, 4):
            part = x[:, first : first + count]
            new, state = mixer.step(part, state, at(first, count))
            parts.append(new)
            first += count
        return jnp.concatenate(parts, axis=1)

    close(call(pair.params, pair.x), y)
