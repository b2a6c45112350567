"""Peak speeds of chips, for utilisation figures."""

# Device kind as jax names it -> dense bfloat16 peak, FLOP/s, from the makers' data
# sheets (NVIDIA H100/H200 SXM 989.4e12, B200 2.25e15, A100 312e12; Google Cloud
# documentation for TPU v4 275e12, v5e 197e12, v5p 459e12, v6e 918e12).
PEAK_FLOPS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in bfloat16, None where we do not know it."""
    return PEAK_FLOPS.get(device_kind)
