"""Targets: "cpu:8", "h200:64", "v5p:4x4x4" and the devices they stand for."""

import contextlib
import dataclasses
import importlib.util
import math
import os

import jax

from attnjax import kernels
from attnjax.core.errors import UserError, nearest
from attnjax.planning.chips import CHIPS, Chip

OWNER = "--target"
EXAMPLES = "cpu:8, h200:8, b200:64, v5e:4x4, v5p:4x4x4 or v6e:16x16"
INSTALL = "pip install -c constraints.txt -e '.[aot]'"
_PACKAGES = {
    "tpu": ("libtpu",),
    "gpu": ("jax_cuda12_plugin", "jax_plugins.xla_cuda12"),
}


@dataclasses.dataclass(frozen=True)
class PlanTarget:
    """Devices to compile for.

    Attributes:
        name: as the user wrote it.
        chip: what they are; None is this machine's CPU.
        sizes: of the topology's axes; one number is a count.
    """

    name: str
    chip: Chip | None
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return "cpu" if self.chip is None else self.chip.platform

    @property
    def kernel_target(self) -> kernels.Target:
        """What kernels are chosen for."""
        kind = self.chip.kind if self.chip else "cpu"
        return kernels.Target(self.platform, kind, num_devices=self.count)


def parse(text: str) -> PlanTarget:
    """The target that a user named.

    Raises:
        UserError: an unknown chip, or a count or topology that it does not have.
    """
    name, _, size = text.partition(":")
    known = ("cpu", *CHIPS)
    if name not in known:
        raise UserError(
            f"{OWNER}: unknown chip {name!r} in {text!r}. {nearest(name, known)} "
            f"Write e.g. {EXAMPLES}."
        )
    chip = CHIPS.get(name)
    axes = 1 if chip is None else chip.shape
    words = size.split("x")
    if len(words) != axes or not all(word.isdecimal() for word in words):
        wanted = "a number of devices" if axes == 1 else f"{axes} sizes"
        example = {1: f"{name}:8", 2: f"{name}:4x4", 3: f"{name}:4x4x4"}[axes]
        raise UserError(
            f"{OWNER}: {name} takes {wanted} after the colon; got {text!r}. Write e.g. "
            f"{example}."
        )
    target = PlanTarget(text, chip, tuple(int(word) for word in words))
    _check_sizes(target)
    return target


def _check_sizes(target: PlanTarget) -> None:
    chip, sizes = target.chip, target.sizes
    if chip is None or chip.platform == "gpu":
        most = 1024 if chip is None else chip.most
        if not 1 <= target.count <= most:
            raise UserError(
                f"{OWNER}: the number of devices must be in [1, {most}]; got "
                f"{target.name!r}."
            )
        if chip is not None and target.count > chip.node and target.count % chip.node:
            near = chip.node * round(target.count / chip.node)
            raise UserError(
                f"{OWNER}: more than {chip.node} GPUs must be whole nodes of "
                f"{chip.node}; got {target.name!r}. Nearest: {chip.name}:{near}."
            )
        return
    allowed = topologies_of(chip)
    if sizes not in allowed:
        near = min(
            allowed,
            key=lambda s: (
                sum(
                    abs(math.log(a / max(b, 0.5)))
                    for a, b in zip(sorted(s), sorted(sizes), strict=True)
                ),
                s,
            ),
        )
        shown = [_text(s) for s in allowed]
        listing = (
            ", ".join(shown)
            if len(shown) <= 30
            else "sizes that rise: 1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, and multiples of "
            "4 up to 16x16x24"
        )
        raise UserError(
            f"{OWNER}: {chip.name} has no topology {_text(sizes)!r}. Nearest: "
            f"{chip.name}:{_text(near)}. Allowed: {listing}."
        )


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def topologies_of(chip: Chip) -> list[tuple[int, ...]]:
    """Slices that can be had (Google Cloud documentation, TPU configurations)."""
    if chip.shape == 2:
        return [
            (1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16),
        ]  # fmt: skip
    small = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    steps = range(4, chip.most + 1, 4)
    large = [
        (a, b, c)
        for a in steps
        for b in steps
        for c in steps
        if a <= b <= c and b <= 16
    ]
    return small + sorted(large, key=lambda s: (math.prod(s), s))


def prepare(target: PlanTarget) -> None:
    """Set up this process for `target`; before jax has touched a device."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    # No TPU is touched, so several processes may plan at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Messages about the devices that are, rightly, not found.
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    if target.platform == "cpu":
        # Refused once devices were asked for; `devices` then counts what is there.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", target.count)


def missing_extra(platform: str) -> str | None:
    """How to install what compiling for `platform` needs, None if it is there."""
    for package in _PACKAGES.get(platform, ()):
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return (
                f"compiling for {platform} needs the extra 'aot', of which "
                f"{package.split('.')[0]} is missing. Install it with: {INSTALL}"
            )
    return None


def devices(target: PlanTarget) -> list:
    """The target's devices: real for CPUs, described for all others.

    Raises:
        UserError: the extra `aot` is not installed, or this process has too few CPU
            devices.
    """
    lacking = missing_extra(target.platform)
    if lacking is not None:
        raise UserError(f"{OWNER}: {lacking}")
    if target.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < target.count:
            raise UserError(
                f"{OWNER}: this process has {len(found)} CPU devices; got "
                f"{target.name!r}. Plan it in a process of its own: python -m "
                f"attnjax.plan --target {target.name}."
            )
        return found[: target.count]
    try:
        return _described(target)
    except jax.errors.JaxRuntimeError as error:
        first = next((x for x in str(error).splitlines() if x.strip()), "")
        raise UserError(
            f"{OWNER}: the compiler's plugin does not describe {target.name}: "
            f"{first[:300]}. Install the versions in constraints.txt: {INSTALL}"
        ) from error


def _described(target: PlanTarget) -> list:
    from jax.experimental import topologies

    if target.platform == "tpu":
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.chip.name}:{_text(target.sizes)}"
        )
        return list(described.devices)
    node = min(target.count, target.chip.node)
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=target.chip.description,
        topology=f"1x{target.count // node}x{node}",
    )
    return list(described.devices)
