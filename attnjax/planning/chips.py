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
        source: what publishes it, or "assumed: WHY".
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
        flops32: peak of float32 products at XLA's default precision, FLOP/s.
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


_XLA = "OpenXLA, xla/backends/gpu/target_config/specs"
# NVIDIA's own pages could not be read when this was checked; where nothing else of
# NVIDIA's or OpenXLA's has the figure, its source says that a copy was seen.
_SHEET = "NVIDIA H100 and H200 data sheets, SXM (seen in a reseller's copy)"
_MLPERF = "NVIDIA's description of its H200 system for MLPerf Inference 4.1"
_HGX = "NVIDIA HGX B200 specifications (seen in copies by third parties)"
_HOPPER = (
    f"{_SHEET}: 1,979 TFLOP/s with sparsity, dense is half; {_XLA}/h100_sxm.txtpb: 528 "
    "units x 1,024 FLOP x 1.83 GHz"
)
_HOPPER32 = (
    f"{_SHEET}: TF32, 989 TFLOP/s with sparsity, dense is half (XLA's default for "
    "float32)"
)
_NVLINK4 = f"{_MLPERF}: 18 links of NVLink 4, 900 GB/s; half each way"
_ADAPTERS = (
    f"{_MLPERF}: 400 Gb/s InfiniBand adapters, of which we assume one for each GPU"
)
_RESERVED = Fact(
    4 * GIB, "assumed: CUDA context, libraries, NCCL buffers and fragmentation"
)


def _gpu(name: str, kind: str, **facts: Fact) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        kind=kind,
        reserved=_RESERVED,
        network=Fact(50e9, _ADAPTERS),
        node=8,
        shape=1,
        most=4096,
        **facts,
    )


def _hopper(name: str, kind: str, *, memory: Fact, bandwidth: Fact) -> Chip:
    return _gpu(
        name,
        kind,
        memory=memory,
        bandwidth=bandwidth,
        flops=Fact(989.4e12, _HOPPER),
        flops32=Fact(494.7e12, _HOPPER32),
        link=Fact(450e9, _NVLINK4),
    )


def _tpu(
    name: str,
    kind: str,
    *,
    memory: Fact,
    available: float,
    bandwidth: Fact,
    tflops: float,
    link: float,
    shape: int,
    most: int,
) -> Chip:
    """A TPU.

    Args:
        name, kind, memory, bandwidth, shape, most: as in Chip.
        available: GiB that the compiler gives a program.
        tflops: bfloat16 peak, TFLOP/s.
        link: documented two-way bandwidth of the interconnect, GB/s.
    """
    page = f"Google Cloud documentation, TPU {name}"
    return Chip(
        name=name,
        platform="tpu",
        kind=kind,
        memory=memory,
        reserved=Fact(
            memory.value - available * GIB,
            f"libtpu: its out-of-memory messages name {available} GiB",
        ),
        bandwidth=bandwidth,
        flops=Fact(tflops * 1e12, f"{page}: peak compute per chip (bf16)"),
        flops32=Fact(
            tflops * 1e12, "XLA's default for float32 on TPU is one bfloat16 pass"
        ),
        link=Fact(
            link / 2 * 1e9,
            f"{page}: {link} GB/s in both directions over all ports, half each way; "
            "'How to Scale Your Model' (Google DeepMind) has the same figure per port",
        ),
        network=Fact(link / 2 * 1e9, "not used: a slice is one interconnect"),
        node=None,
        shape=shape,
        most=most,
    )


_H100 = _hopper(
    "h100",
    "NVIDIA H100 80GB HBM3",
    memory=Fact(84942979072, f"{_XLA}/h100_sxm.txtpb; the data sheet says 80 GB"),
    bandwidth=Fact(3352.32e9, f"{_XLA}/h100_sxm.txtpb; the data sheet says 3.35 TB/s"),
)
_H200 = _hopper(
    "h200",
    "NVIDIA H200",
    memory=Fact(151397597184, f"{_XLA}/h200.txtpb; the data sheet says 141 GB"),
    bandwidth=Fact(4.8e12, f"{_XLA}/h200.txtpb; the data sheet says 4.8 TB/s"),
)
_B200 = _gpu(
    "b200",
    "NVIDIA B200",
    memory=Fact(
        191514411008,
        f"{_XLA}/b200.txtpb; marketed as 180 GB",
    ),
    bandwidth=Fact(
        7672.32e9,
        f"{_XLA}/b200.txtpb: 7,680 bits at 3,996 MHz; marketed as 8 TB/s",
    ),
    flops=Fact(
        2250e12,
        f"{_HGX}: 36 PFLOP/s with sparsity for 8 GPUs, dense is half; "
        f"{_XLA}/b200.txtpb gives 1 % less at its clock",
    ),
    flops32=Fact(
        1125e12,
        f"{_HGX}: TF32, 18 PFLOP/s with sparsity for 8 GPUs, dense is half; "
        f"{_XLA}/b200.txtpb gives 1 % less at its clock",
    ),
    link=Fact(900e9, f"{_HGX}: NVLink 5, 1.8 TB/s per GPU; half each way"),
)
_V5E = _tpu(
    "v5e",
    "TPU v5 lite",
    memory=Fact(16 * GIB, "Google Cloud documentation, TPU v5e: 16 GB"),
    available=15.75,
    bandwidth=Fact(
        819e9,
        "Google Cloud documentation, TPU v5e: 819 GB/s (a later version of the page "
        "says 800 GiB/s; jax.experimental.pallas.tpu's table has 820 GB/s)",
    ),
    tflops=197,
    link=400,
    shape=2,
    most=16,
)
_V5P = _tpu(
    "v5p",
    "TPU v5",
    memory=Fact(
        96 * GIB,
        "jax.experimental.pallas.tpu's table (103 GB); Google Cloud documentation, "
        "TPU v5p: 95 GiB",
    ),
    available=95.73,
    bandwidth=Fact(2765e9, "Google Cloud documentation, TPU v5p: 2,765 GB/s"),
    tflops=459,
    link=1200,
    shape=3,
    most=24,
)
_V6E = _tpu(
    "v6e",
    "TPU v6 lite",
    memory=Fact(32 * GIB, "Google Cloud documentation, TPU v6e: 32 GB"),
    available=31.24,
    bandwidth=Fact(
        1638e9,
        "Google Cloud documentation, TPU v6e: 1,638 GB/s (earlier versions of the "
        "page: 1,640 GB/s)",
    ),
    tflops=918,
    link=800,
    shape=2,
    most=16,
)
CHIPS = {chip.name: chip for chip in (_H100, _H200, _B200, _V5E, _V5P, _V6E)}
