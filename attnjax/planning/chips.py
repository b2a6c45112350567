"""What we know of each chip, every number with its source."""

import dataclasses
from pathlib import Path

GIB = 1 << 30
GPU_TARGETS = Path(__file__).parent / "gpu_targets"


@dataclasses.dataclass(frozen=True)
class Fact:
    """A number and where it is from.

    Attributes:
        value: the number.
        source: a publication of the maker, or "assumed: WHY".
    """

    value: float
    source: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
        name: what targets call it.
        platform: "gpu" or "tpu".
        kind: the device kind as jax names it.
        memory: bytes of device memory.
        reserved: bytes of it that a program cannot have.
        bandwidth: of the device memory, bytes/s.
        flops: dense bfloat16 peak, FLOP/s.
        flops32: dense float32 peak, FLOP/s.
        link: bytes/s one way out of a device to its neighbours (NVLink, ICI).
        network: bytes/s one way out of a device to other nodes.
        node: devices that share `link`; None when all of them do.
        shape: axes of a topology, 1 for a plain count.
        most: largest size of an axis of the topology, or largest count.
    """

    name: str
    platform: str
    kind: str
    memory: Fact
    reserved: Fact
    bandwidth: Fact
    flops: Fact
    flops32: Fact
    link: Fact
    network: Fact
    node: int | None
    shape: int
    most: int

    @property
    def usable(self) -> float:
        """Bytes that a program can have."""
        return self.memory.value - self.reserved.value

    def facts(self) -> dict[str, Fact]:
        """Every number with its source, by field."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: fact for name, fact in pairs if isinstance(fact, Fact)}

    @property
    def description(self) -> str:
        """The compiler's description of the chip (GPUs only), a text proto."""
        return (GPU_TARGETS / f"{self.name}.txtpb").read_text()


_H100 = "NVIDIA H100 Tensor Core GPU data sheet, SXM"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet, SXM"
_B200 = "NVIDIA DGX B200 data sheet, an eighth of the system"
_DGX = "NVIDIA DGX H100/H200 and B200 user guides: one 400 Gb/s adapter per GPU"
_GPU_RESERVE = Fact(
    4 * GIB, "assumed: CUDA context, libraries, NCCL buffers and fragmentation"
)
_NETWORK = Fact(50e9, _DGX)


def _gpu(name, kind, memory, bandwidth, flops, flops32, link, source, **other) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        kind=kind,
        memory=memory,
        reserved=_GPU_RESERVE,
        bandwidth=Fact(bandwidth, source),
        flops=Fact(flops, f"{source}, half of the figure with sparsity"),
        flops32=Fact(flops32, f"{source}, float32 outside of tensor cores"),
        link=Fact(link, f"{source}: NVLink, half of the two-way figure"),
        network=_NETWORK,
        node=8,
        shape=1,
        most=4096,
        **other,
    )


def _tpu(name, kind, memory, available, bandwidth, flops, link, shape, most) -> Chip:
    source = f"Google Cloud documentation, TPU {name}, system architecture"
    return Chip(
        name=name,
        platform="tpu",
        kind=kind,
        memory=Fact(memory, source),
        reserved=Fact(
            memory - available * GIB,
            "libtpu: the capacity named by its out-of-memory messages",
        ),
        bandwidth=Fact(bandwidth, source),
        flops=Fact(flops, source),
        flops32=Fact(
            flops / 6, "assumed: a float32 product is six bfloat16 passes at 'highest'"
        ),
        link=Fact(link, f"{source}: interchip interconnect, half of the two-way total"),
        network=Fact(link, "not used: a slice is one interconnect"),
        node=None,
        shape=shape,
        most=most,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _gpu(
            "h100",
            "NVIDIA H100 80GB HBM3",
            Fact(80 * GIB - (1 << 29), f"{_H100} (80 GB), less what the driver keeps"),
            3.35e12,
            989.4e12,
            67e12,
            450e9,
            _H100,
        ),
        _gpu(
            "h200",
            "NVIDIA H200",
            Fact(151397597184, f"{_H200} (141 GB), as CUDA reports it"),
            4.8e12,
            989.4e12,
            67e12,
            450e9,
            _H200,
        ),
        _gpu(
            "b200",
            "NVIDIA B200",
            Fact(180e9, f"{_B200} (1,440 GB in all)"),
            8e12,
            2250e12,
            75e12,
            900e9,
            _B200,
        ),
        _tpu("v5e", "TPU v5 lite", 16 * GIB, 15.75, 819e9, 197e12, 100e9, 2, 16),
        _tpu("v5p", "TPU v5", 96 * GIB, 95.73, 2765e9, 459e12, 300e9, 3, 28),
        _tpu("v6e", "TPU v6 lite", 32 * GIB, 31.24, 1640e9, 918e12, 224e9, 2, 16),
    )
}
