"""One mechanism under test: its module, its settings, its compiled functions.

Checks share a `Subject`, so a function is compiled once however many checks run
it. Parameters are drawn at a scale at which scores differ, and noise is added, so
that maps which start at zero do not hide a leak.
"""

import collections
import dataclasses
import types
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.core import schema
from attnjax.core.context import Carried, Context, MixerOut, carried_starts
from attnjax.core.errors import UserError
from attnjax.core.mappings import digest
from attnjax.core.spec import MixerDims, MixerSpec
from attnjax.models.mixer_choice import Choice

# Sizes that do not divide one another where a mechanism allows it: a swapped axis
# must not pass. D is even for rotary positions.
BASE_DIMS = MixerDims(
    embed_dim=20,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    num_layers=2,
    max_len=16,
    rope=nn.Rope(),
    init_std=0.3,
    out_init_std=0.3,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a mechanism may say about its own test, as `CONFORMANCE = {...}`.

    Attributes:
        config: options under which a short sequence exercises the mechanism (a
            window of 4 instead of 1024).
        dims: fields of MixerDims that it needs otherwise (num_kv_heads: 6).
        length: tokens of a test sequence; from 8 on.
        grid: sizes of the grid that `length` flattens, for mechanisms with grids.
        extra_tokens: how many of `length` stand before a grid where there are some
            (none: the fewest that leave axes longer than 1); for mechanisms that
            take grids of some lengths alone.
        no_gradient: {path of a parameter: why it has none}.
        not_the_derivative: why its gradient is on purpose not the derivative
            (a straight-through choice), or "".
        bf16_tolerance: allowed difference of bfloat16, in standard deviations of
            the output, at nine entries of ten.
    """

    config: dict = dataclasses.field(default_factory=dict)
    dims: dict = dataclasses.field(default_factory=dict)
    length: int = 13
    grid: tuple[int, ...] | None = None
    extra_tokens: int | None = None
    no_gradient: dict = dataclasses.field(default_factory=dict)
    not_the_derivative: str = ""
    bf16_tolerance: float = 0.15


def settings_of(module: types.ModuleType) -> Settings:
    """The module's CONFORMANCE, checked."""
    given = getattr(module, "CONFORMANCE", {})
    path = f"{module.SPEC.name}: CONFORMANCE"
    kinds = schema.field_types(Settings)
    unknown = sorted(set(given) - set(kinds))
    if unknown:
        raise UserError(f"{path}: unknown {unknown}; known: {sorted(kinds)}.")
    return Settings(**given)


def jitted(function, **options):
    """jax.jit for a program that runs a few times: on a CPU it compiles in half the
    time without LLVM's optimisations, which are not what is tested."""
    if jax.default_backend() == "cpu":
        options["compiler_options"] = {"xla_backend_optimization_level": 0}
    return jax.jit(function, **options)


class Subject:
    """A mechanism with one choice of options and dims.

    Args:
        module: the mechanism.
        overrides: options on top of CONFORMANCE["config"].
        dims: fields of MixerDims on top of CONFORMANCE["dims"].
    """

    def __init__(
        self,
        module: types.ModuleType,
        *,
        overrides: dict | None = None,
        dims: dict | None = None,
    ):
        self.module = module
        self.settings = settings_of(module)
        given = schema.merge(self.settings.config, overrides or {})
        name = module.SPEC.name
        self.options = schema.resolve(module.Config, given, path=name)
        self.config = schema.build(module.Config, self.options, path=name)
        self.spec: MixerSpec = module.SPEC.of(self.config)
        self.dims = dataclasses.replace(
            BASE_DIMS, **{"grid": self.grid, **self.settings.dims, **(dims or {})}
        )
        self.traces: collections.Counter = collections.Counter()
        self.forward = jitted(self._counted_call)
        self.step = jitted(self._counted_step, donate_argnums=(2,))

    # ---- what it is

    @property
    def causal(self) -> bool:
        """The `ctx.causal` that checks use when either would do."""
        return self.spec.capabilities.causal

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The grid of the model and of its requests, for mechanisms that need one."""
        return self.settings.grid if self.spec.capabilities.needs_grid else None

    @property
    def length(self) -> int:
        """T."""
        return self.settings.length

    def build(self, rngs: nnx.Rngs | None = None) -> nnx.Module:
        """The module, as a model builds it."""
        choice = Choice(self.spec.name, self.module, self.config)
        return choice.make(self.dims, rngs=rngs or nnx.Rngs(0))

    @cached_property
    def graph(self) -> Any:
        """Its static graph definition."""
        mixer = nnx.eval_shape(self.build)
        try:
            return nnx.split(mixer, nnx.Param, nn.Buffer)[0]
        except ValueError as error:
            raise UserError(
                f"{self.spec.name}: every variable must be an nnx.Param or an "
                f"attnjax.nn.Buffer. {error}"
            ) from error

    def init(self, index) -> tuple[dict, dict]:
        """(params, buffers) of layer `index` as a model starts."""
        mixer = self.build()
        params = nn.materialize(mixer, jax.random.key(11), index=index)
        return params, nnx.to_pure_dict(nnx.state(mixer, nn.Buffer))

    @cached_property
    def layers(self) -> tuple[dict, dict]:
        """(params, buffers) of two layers, stacked, with noise on the parameters."""
        # Drawn outside jit, even where a test first asks inside one: the draws of one
        # shape are compiled once for all mechanisms. That the init can be mapped over
        # layers is traced.
        with jax.ensure_compile_time_eval():
            jax.eval_shape(jax.vmap(self.init), jax.ShapeDtypeStruct((2,), np.int32))
            params, buffers = jax.tree.map(
                lambda *a: np.stack(a), *(self.init(np.int32(i)) for i in range(2))
            )
            rng = np.random.default_rng(5)
            noised = jax.tree.map(
                lambda p: (p + 0.1 * rng.normal(size=p.shape)).astype(p.dtype), params
            )
            return jax.tree.map(jnp.asarray, (noised, buffers))

    @cached_property
    def arrays(self) -> tuple[dict, dict]:
        """(params, buffers) of one layer."""
        with jax.ensure_compile_time_eval():
            return jax.tree.map(lambda a: a[0], self.layers)

    # ---- what it does

    def call(self, arrays, x, ctx: Context) -> tuple[jax.Array, MixerOut, dict]:
        """y, MixerOut and the new buffers of one layer."""
        mixer = nnx.merge(self.graph, *arrays)
        y, out = mixer(x, ctx)
        return y, out, nnx.to_pure_dict(nnx.state(mixer, nn.Buffer))

    def call_step(self, arrays, x, state, ctx: Context):
        """y and the new state."""
        return nnx.merge(self.graph, *arrays).step(x, state, ctx)

    def init_state(self, batch: int, max_len: int, memory=None):
        """The decode state of one layer."""
        return self.new_state(
            nnx.merge(self.graph, *self.arrays), batch, max_len, memory
        )

    def new_state(self, mixer: nnx.Module, batch: int, max_len: int, memory=None):
        """The state of a built layer, which is given the streams that it names."""
        given = {}
        if getattr(mixer, "stream_names", ()):
            given["streams"] = self.streams(max_len)
        return mixer.init_state(batch, max_len, memory, **given)

    def streams(self, length: int) -> dict[str, np.ndarray]:
        """The extra residual streams that the mechanism asks for, each [1, T, C]; a
        longer one begins like a shorter one."""
        make = getattr(self.module, "streams", None)
        if make is None:
            return {}
        starts = jax.eval_shape(lambda: make(self.config, self.dims, jax.random.key(0)))
        shape = (1, length, self.dims.embed_dim)
        dtype = jnp.dtype(self.dims.dtype)
        return {
            name: np.random.default_rng(8).normal(size=shape).astype(dtype)
            for name in starts
        }

    def declared_carried(self) -> dict[str, Carried]:
        """What the mechanism says that layers hand on."""
        make = getattr(self.module, "carried", None)
        return {} if make is None else make(self.config, self.dims)

    def carried(self, batch: int, length: int) -> dict[str, np.ndarray]:
        """What the first layer is given of it, [B, T] each."""
        dtype = jnp.dtype(self.dims.dtype)
        starts = carried_starts(self.declared_carried(), (batch, length), dtype)
        return {name: np.asarray(start) for name, start in starts.items()}

    def _counted_call(self, arrays, x, ctx: Context):
        self.traces["call", x.shape, str(jax.tree.structure(ctx))] += 1
        y, out, _ = self.call(arrays, x, ctx)
        return y, out

    def _counted_step(self, arrays, x, state, ctx: Context):
        self.traces["step", x.shape, str(jax.tree.structure((state, ctx)))] += 1
        return self.call_step(arrays, x, state, ctx)

    def y(self, x, ctx: Context) -> np.ndarray:
        """The compiled output of one layer as float64 numpy."""
        y, _ = self.forward(self.arrays, x, ctx)
        return np.asarray(jax.device_get(y)).astype(np.float64)


_subjects: dict[tuple, Subject] = {}


def subject(
    module: types.ModuleType,
    overrides: dict | None = None,
    dims: dict | None = None,
) -> Subject:
    """The shared Subject of these settings: the same one for the same settings."""
    name = (id(module), digest(overrides or {}), digest(dims or {}))
    if name not in _subjects:
        _subjects[name] = Subject(module, overrides=overrides, dims=dims)
    return _subjects[name]


def nested(flat: dict[str, Any]) -> dict:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict = {}
    for path, value in flat.items():
        *head, last = path.split(".")
        node = tree
        for part in head:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def forget(module: types.ModuleType) -> None:
    """Drop what was compiled for `module`."""
    for name in [name for name in _subjects if name[0] == id(module)]:
        del _subjects[name]
