"""What a linear attention computes, as one static, hashable value."""

import dataclasses

from attnjax.kernels.errors import nearest

DECAYS = ("none", "head", "token", "channel")


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """The flags of the recurrence on a state S [D, E] of each key/value head

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T                                (plain)
        S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T  (delta)
        o_t = scale * q_t^T S_t,   divided by q_t^T z_t with `normalise`,

    where z follows the recurrence of S with v_t = 1.

    Source: Katharopoulos et al., arXiv 2006.16236, eq. 16-20; Yang et al., arXiv
    2312.06635, eq. 3 (decay); Yang et al., arXiv 2406.06484, eq. 2, and arXiv
    2412.06464, eq. 10 (delta rule). Feature maps are the caller's.

    Attributes:
        decay: what alpha = exp(log_decay) depends on: "none" (alpha is 1), "head"
            (operand log_decay [K]), "token" ([B, T, K]) or "channel" ([B, T, K, D]).
        delta: whether a key's old value is taken out before the new one goes in;
            operand beta [B, T, K].
        normalise: divide by q_t^T z_t; rows where that is 0 are 0. Without `delta`.
        scale: factor of the queries; None means 1.
        chunk_size: tokens a chunk of the chunked forms; a power of 2.
        return_state: return the state after the last token too.

    Raises:
        ValueError: when a field has no such value.
    """

    decay: str = "none"
    delta: bool = False
    normalise: bool = False
    scale: float | None = None
    chunk_size: int = 64
    return_state: bool = False

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise ValueError(
                f"LinearSpec: unknown decay {self.decay!r}. "
                f"{nearest(self.decay, DECAYS)}"
            )
        if self.delta and self.normalise:
            raise ValueError(
                "LinearSpec: normalise goes without delta, whose weights change sign; "
                "got delta=True, normalise=True. Normalise the output instead."
            )
        size = self.chunk_size
        if size < 1 or size & (size - 1):
            raise ValueError(
                "LinearSpec: chunk_size must be a power of 2; got "
                f"chunk_size={size}. Use 64."
            )
