"""What a kernel will run on, said explicitly so that planning can ask for another."""

import dataclasses

import jax

from attnjax.kernels.errors import nearest

PLATFORMS = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to choose an implementation for.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        device_kind: the device's own name, e.g. "NVIDIA H200" or "TPU v5e"; "" when
            it is not known, which refuses what depends on it.
        jax_version: version of jax that compiles the program.
        num_devices: how many devices the compiler splits the program over. It cannot
            split some kernels: with more than one, those are for `shard_map` alone.
    """

    platform: str
    device_kind: str = ""
    jax_version: str = jax.__version__
    num_devices: int = 1

    def __post_init__(self):
        if self.platform not in PLATFORMS:
            raise ValueError(
                f"Target: unknown platform {self.platform!r}. "
                f"{nearest(self.platform, PLATFORMS)}"
            )


def default_target() -> Target:
    """The default backend of this process, for callers that named no target."""
    return Target(
        platform=jax.default_backend(),
        device_kind=jax.devices()[0].device_kind,
        num_devices=jax.device_count(),
    )
