"""Drawing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from attnjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn. Static and hashable.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p
            (Holtzman et al., arXiv 1904.09751); 1 keeps all.

    Raises:
        UserError: for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(
                f"sampler: temperature must not be negative; got {self.temperature}. "
                "0 is greedy."
            )
        if self.top_k < 0:
            raise UserError(
                f"sampler: top_k must not be negative; got {self.top_k}. 0 keeps all."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(
                f"sampler: top_p must be in (0, 1]; got {self.top_p}. 1 keeps all."
            )


def filtered(logits: jax.Array, sampler: Sampler) -> jax.Array:
    """Logits [..., V] after temperature, top-k and top-p; dropped tokens are -inf."""
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampler.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampler.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = before < sampler.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, sampler: Sampler, prng_key: jax.Array) -> jax.Array:
    """Logits [B, V] -> int32 tokens [B]."""
    if sampler.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    choice = jax.random.categorical(prng_key, filtered(logits, sampler), axis=-1)
    return choice.astype(jnp.int32)
