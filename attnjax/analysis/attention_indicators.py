"""Five numbers about an attention map: how spread, how diverse, how local it is.

Source: Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602, the
section on attention patterns. Maps come from the hook "weights" of any mixer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.context import Context, Hook

NEARBY = 4  # N of LocFoc_N goes from 0 to 3.


def indicators(weights: jax.Array) -> dict[str, jax.Array]:
    """The indicators of one layer.

    Args:
        weights: causal maps [B, H, T, T] of whole sequences without padding.

    Returns:
        Scalars in float32 or wider, averaged over the batch:
        "entropy": -sum_j a_ij ln a_ij in nats, mean over heads and queries (entries
            of 0 and less have none);
        "concentration": Frobenius norm of a head's map, mean over heads;
        "head_diversity": standard deviation over heads, mean over the entries j <= i;
        "sink": a_i0, mean over heads and queries;
        "local_focus_0" to "local_focus_3": mean of the N-th diagonal under the main
            one; those that a short map does not have are left out.
    """
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    length = weights.shape[-1]
    logs = jnp.log(jnp.where(weights > 0, weights, 1))
    spread = jnp.tril(jnp.std(weights, axis=1))
    found = {
        "entropy": -jnp.mean(jnp.sum(weights * logs, axis=-1)),
        "concentration": jnp.mean(jnp.sqrt(jnp.sum(weights**2, axis=(-2, -1)))),
        "head_diversity": jnp.mean(
            2 * jnp.sum(spread, axis=(-2, -1)) / (length * (length + 1))
        ),
        "sink": jnp.mean(weights[..., 0]),
    }
    for n in range(min(NEARBY, length)):
        diagonal = jnp.diagonal(weights, offset=-n, axis1=-2, axis2=-1)
        found[f"local_focus_{n}"] = jnp.mean(diagonal)
    return found


def by_layer(
    model, params: dict, buffers: dict, tokens: jax.Array, *, layers=None
) -> dict[int, dict[str, float]]:
    """The indicators of each layer of a language model.

    Args:
        model: a `models.lm.LM`.
        params, buffers: its arrays.
        tokens: int32 [B, T], whole sequences.
        layers: which layers have a map; None: all.

    Returns:
        {layer: {indicator: value}}.

    Raises:
        UserError: when a layer has no map (the hook "weights").
    """
    chosen = None if layers is None else tuple(layers)
    hook = Hook("indicated map", "weights", layers=chosen)

    @jax.jit
    def run(params, buffers, tokens):
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        ctx = Context(positions=jnp.broadcast_to(places, tokens.shape), hooks=(hook,))
        _, out = model.hidden(params, buffers, tokens, ctx)
        return {
            layer: indicators(records[hook.name])
            for layer, records in out.records.items()
            if hook.name in records
        }

    return jax.tree.map(float, jax.device_get(run(params, buffers, tokens)))


def normalised(table: dict[Any, dict[str, float]]) -> dict[Any, dict[str, float]]:
    """Each indicator brought to [0, 1] over the rows of a table, as in the plots; one
    that does not vary becomes 0."""
    names = sorted({name for row in table.values() for name in row})
    result: dict = {key: {} for key in table}
    for name in names:
        rows = [key for key, row in table.items() if name in row]
        values = np.asarray([table[key][name] for key in rows])
        low, high = values.min(), values.max()
        scaled = (values - low) / (high - low) if high > low else np.zeros(len(rows))
        for key, value in zip(rows, scaled, strict=True):
            result[key][name] = float(value)
    return result
