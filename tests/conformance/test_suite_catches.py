"""The suite itself: a mixer that conforms passes, each broken one fails where it must.

A broken mixer is toy_mixer.txt with one place changed.
"""

import re
from pathlib import Path

import pytest

from attnjax.conformance import run
from attnjax.core.errors import UserError

TOY = Path(__file__).with_name("toy_mixer.txt").read_text()

# What is broken -> (text, its replacement, the case that must fail, its message).
BROKEN = {
    "leaks the future": (
        "value = self.value(x).astype(jnp.float32) ** self.config.power",
        "value = self.value(x + 0.1 * jnp.roll(x, -1, 1)).astype(jnp.float32)",
        "causality",
        "outputs before token .* must not depend on it",
    ),
    "leaks the batch": (
        "y = self.out(mixed)",
        "y = self.out(mixed + jnp.mean(mixed, 0))",
        "batch_rows_are_independent",
        "row 0 must not depend on row 1",
    ),
    "leaks padding": (
        "total = jnp.where(is_token, total, state.total)",
        "pass",
        "padding",
        "must not depend on padding",
    ),
    "leaks documents": (
        "jnp.where(same, decay * state.total, 0)",
        "decay * state.total",
        "documents",
        "other documents must not depend",
    ),
    "counts positions through padding": (
        "y = self.out(mixed)",
        "y = self.out(mixed * (1 + jnp.arange(x.shape[1]))[:, None])",
        "documents",
        "must give what it gives alone",
    ),
    "does not mix": (
        "total = jnp.where(same, decay * state.total, 0) + value",
        "total = value",
        "mixes_tokens",
        "some later y must depend on token 0",
    ),
    "divides by zero in padding": (
        "return State(total, segment), jnp.where(is_token, total, 0)",
        "return State(total, segment), jnp.where(is_token, total, 0 / total * 0)",
        "shapes_and_dtypes",
        "y must be finite",
    ),
    "returns another dtype": (
        "return y, MixerOut()",
        "return y.astype(jnp.float32), MixerOut()",
        "bfloat16",
        "y must be bfloat16",
    ),
    "loses precision": (
        "mixed = jnp.moveaxis(totals, 0, 1).astype(x.dtype)",
        "mixed = (jnp.moveaxis(totals, 0, 1).astype(x.dtype) + 100.0) - 100.0",
        "bfloat16",
        "bfloat16 must be near float32",
    ),
    "ignores the storage dtype": (
        'dtype=kinds["param_dtype"],\n        )',
        "dtype=jnp.float16,\n        )",
        "shapes_and_dtypes",
        "parameter decay must be stored in dims.param_dtype",
    ),
    "has a dead parameter": (
        "decay = jax.nn.sigmoid(self.decay[...].astype(jnp.float32))",
        "decay = 0.5",
        "parameter_gradients",
        r"got zero for decay \(layer 0\)",
    ),
    "stops the gradient of x": (
        "mixed = jnp.moveaxis(totals, 0, 1).astype(x.dtype)",
        "mixed = jax.lax.stop_gradient(jnp.moveaxis(totals, 0, 1).astype(x.dtype))",
        "input_gradients",
        "x must have a gradient through the mixer",
    ),
    "has half of a gradient": (
        "value = self.value(x).astype(jnp.float32)",
        "value = self.value(0.5 * x + jax.lax.stop_gradient(0.5 * x))",
        "gradient_is_the_derivative",
        "must be the derivative of the output",
    ),
    "branches on the layer in Python": (
        "y = self.out(mixed)",
        "y = self.out(mixed if ctx.layer_index < 1 else 2 * mixed)",
        "scan_and_remat",
        "TracerBoolConversionError",
    ),
    "pins one device": (
        "y = self.out(mixed)",
        "one = jax.sharding.SingleDeviceSharding(jax.devices()[0])\n"
        "        y = jax.lax.with_sharding_constraint(self.out(mixed), one)",
        "eight_devices",
        "ncompatible devices",
    ),
    "reads a grid that it does not declare": (
        "y = self.out(mixed)",
        "y = self.out(2 * mixed if ctx.grid else mixed)",
        "grids",
        "declares no grid ranks",
    ),
    "reads extra tokens that it does not declare": (
        "y = self.out(mixed)",
        "y = self.out(2 * mixed if ctx.extra_tokens else mixed)",
        "grids",
        "so ctx.grid and ctx.extra_tokens must change nothing",
    ),
    "declares grids that it does not read": (
        "capabilities=Capabilities()",
        "capabilities=Capabilities(grid=(1, 2))",
        "grids",
        r"y must differ on the grids \(13,\) and \(1, 13\)",
    ),
    "declares extra tokens without a grid": (
        "capabilities=Capabilities()",
        "capabilities=Capabilities(extra_tokens=True)",
        "well_formed",
        "extra_tokens goes with grid ranks",
    ),
    "has no title": (
        'title="Decayed sum"',
        'title=""',
        "well_formed",
        "SPEC.title must not be empty",
    ),
    "compares configs by identity": (
        "@dataclasses.dataclass(frozen=True)",
        "@dataclasses.dataclass(frozen=True, eq=False)",
        "config_round_trip",
        "Config must survive JSON",
    ),
    "decodes without its memory": (
        "ids = ctx.segment_ids\n",
        "if ctx.memory is not None and x.shape[1] > 1:\n"
        "            value = value + jnp.mean(ctx.memory, axis=1, keepdims=True)\n"
        "        ids = ctx.segment_ids\n",
        "decode_with_memory",
        "must equal the full pass",
    ),
    "counts its parameters wrong": (
        "+ dims.embed_dim\n\n\ndef state_size",
        "\n\n\ndef state_size",
        "parameter_count",
        "SPEC.parameter_count must be what is built; got 800, built 820",
    ),
    "counts no biases": (
        "(dims.embed_dim + dims.use_bias)",
        "dims.embed_dim",
        "parameter_count",
        "with dims {'use_bias': True}",
    ),
    "counts its state wrong": (
        "return dims.embed_dim + 1",
        "return dims.embed_dim",
        "state_size",
        "SPEC.state_size must count the state of one sequence; got 20",
    ),
    "forgets when decoding": (
        "return self.mix(x, state, ctx)",
        "y, new = self.mix(x, state, ctx)\n"
        "        return y, new._replace(total=0.9 * new.total)",
        "decode_any_cuts",
        "must equal the full pass",
    ),
    "changes the dtype of its state": (
        "return self.mix(x, state, ctx)",
        "y, new = self.mix(x, state, ctx)\n"
        "        return y, new._replace(segment=new.segment.astype(jnp.float32))",
        "decode_any_cuts",
        "step must keep the shapes and dtypes of the state",
    ),
    "traces step twice": (
        "jnp.zeros((batch,), jnp.int32)\n",
        "jax.lax.full((batch,), 0)\n",
        "decode_any_cuts",
        "step must be traced once",
    ),
    "ends no document when decoding": (
        "return self.mix(x, state, ctx)",
        "ids = jnp.minimum(ctx.segment_ids, 1)\n"
        "        return self.mix(x, state, ctx.replace(segment_ids=ids))",
        "decode_packed_documents",
        "must equal the full pass",
    ),
    "decodes only with segments": (
        "ids = jnp.broadcast_to(jnp.maximum(state.segment, 1)[:, None], x.shape[:2])",
        "ids = jnp.broadcast_to(state.segment[:, None] + 1, x.shape[:2])",
        "decode_without_segments",
        "decoding without segment_ids must be exact",
    ),
    "differs without segments": (
        "if ids is None:",
        "if ids is None:\n            value = 2 * value",
        "short_lengths",
        "without segment_ids, must give what they give in a row of 13",
    ),
    "accepts what it does not do": (
        "check_request(SPEC, ctx)\n",
        "pass\n",
        "undeclared_is_refused",
        "ctx.causal=False is not declared .* it was accepted",
    ),
    "crashes instead of refusing": (
        "check_request(SPEC, ctx)\n",
        "assert ctx.causal\n",
        "undeclared_is_refused",
        "must be refused with a UserError; got AssertionError",
    ),
    "refuses without its name": (
        "check_memory(SPEC, memory)",
        "if memory is not None:\n            raise NotImplementedError('no memory')",
        "undeclared_is_refused",
        "the refusal of .* must name the mechanism",
    ),
    "is not bidirectional": (
        "capabilities=Capabilities()",
        "capabilities=Capabilities(bidirectional=True)",
        "bidirectional",
        "some earlier output must depend on the last token",
    ),
    "has no prefix": (
        "capabilities=Capabilities()",
        "capabilities=Capabilities(prefix=True)",
        "prefix",
        "a token of the prefix must be seen by earlier ones",
    ),
    "ignores its memory": (
        "capabilities=Capabilities()",
        "capabilities=Capabilities(cross=True)",
        "cross",
        "outputs must depend on ctx.memory",
    ),
    "has a dead switch": (
        "if config.gate else None",
        "if False else None",
        "options_matter",
        "these change nothing: gate=True",
    ),
    "has a dead choice": (
        'if self.config.scale == "half":',
        "if False:",
        "options_matter",
        "these change nothing: scale='half'",
    ),
    "has an option that only dead code reads": (
        "** self.config.power",
        "\n        unused = value**self.config.power",
        "options_matter",
        "these change nothing: power",
    ),
    "ignores the model's dropout": (
        "y = nn.dropout(y, self.dims.dropout",
        "y = nn.dropout(y, 0.0",
        "model_settings_matter",
        "dims.dropout changes nothing",
    ),
    "declares a difference that is none": (
        "decode=Decode(exact=True)",
        "decode=Decode(exact=False, reason='it forgets')",
        "decode_declared_difference",
        "declares a difference that the settings of this test do not show",
    ),
    "gives no reason for a difference": (
        "decode=Decode(exact=True)",
        "decode=Decode(exact=False)",
        "decode_declared_difference",
        "must give the reason",
    ),
    "costs nothing": (
        "4.0 * seq_len * dims.embed_dim**2",
        "0.0",
        "flops",
        "must be positive",
    ),
    "breaks in a variant alone": (
        "jax.nn.sigmoid(self.gate(x))",
        "jax.nn.sigmoid(self.gate(jnp.roll(x, -1, 1)))",
        "variant[gate=True]",
        "outputs before token",
    ),
}


def write(folder: Path, *changes: str) -> str:
    """The toy with texts replaced, (old, new) after (old, new)."""
    text = TOY
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    path = folder / "toy_mixer.py"
    path.write_text(text)
    return str(path)


def test_a_mixer_outside_the_package_that_conforms_passes_everything(tmp_path):
    report = run(write(tmp_path))
    assert report.passed, str(report)
    assert len(report.results) > 25
    assert all(result.outcome == "pass" for result in report.results), str(report)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_mixer_is_caught(name, tmp_path):
    old, new, case, message = BROKEN[name]
    path = write(tmp_path, old, new)
    if case == "decode_with_memory":
        path = write(tmp_path, old, new, "Capabilities()", "Capabilities(cross=True)")
    report = run(path, only=lambda other: other == case)
    (result,) = report.results
    assert result.outcome == "fail", str(report)
    assert not report.passed
    assert re.search(message, result.message), result.message


def test_unknown_settings_of_the_test_are_refused(tmp_path):
    path = write(tmp_path, "VARIANTS =", "CONFORMANCE = {'lenght': 9}\nVARIANTS =")
    (result,) = run(path, only=lambda case: case == "flops").results
    assert "CONFORMANCE: unknown ['lenght']" in result.message


def test_a_missing_mechanism_is_a_users_mistake():
    with pytest.raises(UserError, match="no_such_mixer"):
        run("no_such_mixer")
