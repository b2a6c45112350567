"""Every mechanism of the catalog beside plain attention: time, size, decode state."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.benchmarks import machine, tables, timing
from attnjax.core import discovery, schema
from attnjax.core.context import Context, carried_starts
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.data.progress import progress
from attnjax.models.mixer_choice import Choice

BASE = "attention"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One layer and how often it is timed.

    Attributes:
        batch_size, seq_len: B and T; T is a power of 2.
        embed_dim, num_heads: C and H.
        rounds: rounds in which a mechanism and `attention` take turns.
        calls: calls in a turn.
    """

    batch_size: int = 2
    seq_len: int = 256
    embed_dim: int = 128
    num_heads: int = 4
    rounds: int = 12
    calls: int = 3

    @property
    def dims(self) -> MixerDims:
        """What the mechanism is told."""
        return MixerDims(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            max_len=self.seq_len,
            rope=nn.Rope(),
        )


class Layer:
    """One mechanism at its defaults: arrays and the two compiled programs.

    Args:
        name: its name in the catalog, or the path of its file.
        sizes: the layer's sizes.
    """

    def __init__(self, name: str, sizes: Sizes):
        module = discovery.find(name, owner="bench mixers")
        options = schema.resolve(module.Config, _needed(module), path=name)
        self.config = schema.build(module.Config, options, path=name)
        self.module, self.spec = module, module.SPEC.of(self.config)
        can, self.sizes = self.spec.capabilities, sizes
        grid = _grid(sizes.seq_len, can.grid) if can.needs_grid else None
        self.dims = dataclasses.replace(sizes.dims, grid=grid)
        choice = Choice(name, module, self.config)
        mixer = choice.make(self.dims, rngs=nnx.Rngs(0))
        self.graph, params, buffers = nnx.split(mixer, nnx.Param, nn.Buffer)
        self.arrays = nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
        shape = (sizes.batch_size, sizes.seq_len, sizes.embed_dim)
        rng = np.random.default_rng(0)
        self.x, self.weights = (
            jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)
        )
        self.ctx = self._context()
        self.forward = self._compile(self._output)
        self.train = self._compile(jax.grad(self._loss, argnums=(0, 2)))

    def _context(self) -> Context:
        sizes = self.sizes
        places = jnp.arange(sizes.seq_len, dtype=jnp.int32)
        return Context(
            positions=jnp.tile(places, (sizes.batch_size, 1)),
            embeddings=self.x,
            streams=self._streams(),
            carried=self._carried(),
            layer_index=jnp.int32(0),
            prng_key=jax.random.key(0),
            causal=self.spec.capabilities.causal,
            grid=self.dims.grid,
            train=True,
        )

    def _streams(self) -> dict[str, jax.Array]:
        """Extra residual streams, where the mechanism asks for them: [1, T, C]."""
        make = getattr(self.module, "streams", None)
        if make is None:
            return {}
        starts = make(self.config, self.dims, jax.random.key(0))
        return {name: self.x[:1] for name in starts}

    def _carried(self) -> dict[str, jax.Array]:
        """What layers hand on, where the mechanism does: [B, T] each."""
        make = getattr(self.module, "carried", None)
        if make is None:
            return {}
        declared = make(self.config, self.dims)
        return carried_starts(declared, self.x.shape[:2], self.x.dtype)

    def _compile(self, function):
        params, buffers = self.arrays
        given = (params, buffers, self.x, self.ctx)
        return jax.jit(function).lower(*given).compile()

    def _output(self, params, buffers, x, ctx):
        mixer = nnx.merge(self.graph, params, buffers)
        return mixer(x, ctx)

    def _loss(self, params, buffers, x, ctx):
        y, out = self._output(params, buffers, x, ctx)
        return jnp.vdot(y, self.weights) + sum(out.losses.values())

    def runner(self, program):
        """A function that makes n calls of one of the programs."""
        given = (*self.arrays, self.x, self.ctx)

        def run(count: int) -> None:
            for _ in range(count):
                out = program(*given)
            jax.block_until_ready(out)

        return run

    def facts(self) -> dict[str, Any]:
        """Size and cost of the layer for one sequence, from its arrays and spec."""
        dims, length = self.dims, self.sizes.seq_len
        decodes = self.spec.capabilities.decode
        leaves = jax.tree.leaves(self.arrays[0])
        return {
            "mixer": self.spec.name,
            "family": self.spec.family,
            "parameters": sum(leaf.size for leaf in leaves),
            "flops": float(self.spec.flops(self.config, dims, length)),
            "state_size": int(self.spec.state_size(self.config, dims, length))
            if decodes
            else None,
        }


def _needed(module) -> dict[str, Any]:
    """Values for options that have no default, as its conformance test has them."""
    required = [
        field.name
        for field in dataclasses.fields(module.Config)
        if not schema.has_default(field)
    ]
    given = getattr(module, "CONFORMANCE", {}).get("config", {})
    missing = [name for name in required if name not in given]
    if missing:
        raise UserError(
            f"{module.SPEC.name}: options without a default need a value in "
            f"CONFORMANCE['config']; got none for {', '.join(missing)}. Add them."
        )
    return {name: given[name] for name in required}


def _grid(length: int, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Sides, powers of 2 whose product is `length`, at the rank nearest to 2."""
    rank = min(ranks, key=lambda r: abs(r - 2))
    bits = length.bit_length() - 1
    if 1 << bits != length:
        raise ValueError(f"bench mixers: seq_len must be a power of 2; got {length}.")
    shares = [bits // rank + (place < bits % rank) for place in range(rank)]
    return tuple(1 << share for share in shares)


def run(pattern: str | None = None, *, sizes: Sizes | None = None) -> dict[str, Any]:
    """Measure the mechanisms whose names match `pattern` (all of them without one).

    Returns:
        "sizes", "machine", "load", "skipped" ({name: why it cannot be built at these
        sizes}) and "rows": per mechanism "forward_ms" and "train_ms" (forward and
        backward), "forward_ratio" and "train_ratio" (its time over attention's in
        the same rounds) with "_low" and "_high" ends of their 95 % intervals,
        "parameters", "flops" of a forward pass and "state_size" (elements of the
        decode state, None without one), both for one sequence.

    Raises:
        UserError: when the pattern matches no mechanism.
    """
    sizes, load = sizes or Sizes(), timing.load_average()
    names = _matching(pattern)
    base = Layer(BASE, sizes)
    rows, skipped = [], {}
    with progress("mechanisms", total=len(names)) as advance:
        for name in names:
            try:
                rows.append(_measure(base, name, sizes))
            except UserError as error:
                skipped[name] = str(error)
            advance(1)
    return {
        "benchmark": "mixers",
        "sizes": dataclasses.asdict(sizes),
        "machine": machine.describe(),
        "load": load,
        "skipped": skipped,
        "rows": rows,
    }


def _matching(pattern: str | None) -> list[str]:
    known = discovery.names()
    found = [name for name in known if re.search(pattern or "", name)]
    if not found:
        raise UserError(
            f"bench mixers: --filter matches no mechanism; got {pattern!r}. "
            f"Mechanisms: {', '.join(known)}."
        )
    return found


def _measure(base: Layer, name: str, sizes: Sizes) -> dict[str, Any]:
    layer = base if name == BASE else Layer(name, sizes)
    row = layer.facts()
    for what in ("forward", "train"):
        programs = {BASE: base.runner(getattr(base, what))}
        programs[name] = layer.runner(getattr(layer, what))
        samples = timing.interleave(programs, rounds=sizes.rounds, calls=sizes.calls)
        ratio = timing.ratio(samples[name].wall, samples[BASE].wall)
        row |= {
            f"{what}_ms": 1e3 * samples[name].median,
            f"{what}_ratio": ratio.median,
            f"{what}_low": ratio.low,
            f"{what}_high": ratio.high,
        }
    return row


def print_report(report: dict[str, Any]) -> None:
    """The report as text."""
    sizes = report["sizes"]
    print(machine.line(report["machine"]))
    print(
        f"one layer, width {sizes['embed_dim']}, {sizes['num_heads']} heads, "
        f"{sizes['batch_size']} x {sizes['seq_len']} tokens; x is the time over "
        "attention's in the same rounds; state and FLOPs are those of one sequence"
    )
    tables.show(
        ("mixer", "fwd ms", "x", "fwd+bwd ms", "x", "parameters", "MFLOP", "state"),
        [_cells(row) for row in report["rows"]],
    )
    for name, reason in report["skipped"].items():
        print(f"{name} skipped: {reason}")
    timing.print_load(report["load"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    state = row["state_size"]
    return (
        row["mixer"],
        f"{row['forward_ms']:.2f}",
        f"{row['forward_ratio']:.2f}",
        f"{row['train_ms']:.2f}",
        f"{row['train_ratio']:.2f}",
        f"{row['parameters']:,}",
        f"{row['flops'] / 1e6:.1f}",
        "none" if state is None else f"{state:,}",
    )
