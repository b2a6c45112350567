"""The table of tiles under vmap: one for all, so that loops stay loops of blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import blocked, reference
from attnjax.kernels.choose_blocks import plan_blocks
from attnjax.kernels.tile_table import tile_table

PACKED = kernels.AttentionSpec(mask=kernels.Causal() & kernels.Segments())
N, B, T, H, D, BLOCK = 3, 2, 47, 2, 5, 8


def arrays(*shape):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (*shape, T, H, D)) for key in keys]


def segments():
    """[N, B, T]: documents that end in other places in every row."""
    ends = np.random.default_rng(1).integers(-3, 4, (N, B, 2)) + [14, 31]
    return jnp.asarray((np.arange(T) >= ends[..., None]).sum(-2), jnp.int32)


def attend(q, k, v, ids, *, module=blocked, **options):
    operands = {"q_segment_ids": ids, "k_segment_ids": ids}
    request = kernels.make_request(q, k, v, PACKED, operands, kernels.default_target())
    return module.run(request, q, k, v, operands, **options)[0]


def gradients(form):
    def total(q, k, v, ids):
        return jnp.sum(jnp.sin(form(q, k, v, ids)))

    return jax.grad(total, argnums=(0, 1, 2))


tiled = functools.partial(attend, block_sizes=(BLOCK, BLOCK))
exact = functools.partial(attend, module=reference)


def plan_and_padded():
    q, k, v = arrays(B)
    ids = segments()
    named = {"q_segment_ids": ids[0], "k_segment_ids": ids[0]}
    request = kernels.make_request(q, k, v, PACKED, named, kernels.default_target())
    plan = plan_blocks(request, (BLOCK, BLOCK))
    room = plan.num_q * BLOCK - T
    return plan, jnp.pad(ids, ((0, 0), (0, 0), (0, room)))


def test_one_table_serves_a_mapped_axis():
    plan, ids = plan_and_padded()

    def table(ids):
        return tile_table(plan, {"q_segment_ids": ids, "k_segment_ids": ids})

    # out_axes=None: refused by vmap unless the table is the same for all.
    shared = jax.vmap(table, out_axes=None)(ids)
    alone = [table(one) for one in ids]
    assert int(shared.num_full.sum()) <= min(int(t.num_full.sum()) for t in alone)
    visited = [int((t.num_full + t.num_partial).sum()) for t in alone]
    assert int((shared.num_full + shared.num_partial).sum()) >= max(visited)
    causal = plan.num_q * (plan.num_q + 1) // 2
    assert int((shared.num_full + shared.num_partial).sum()) < causal


def test_gradients_under_vmap_are_those_of_separate_calls():
    q, k, v = arrays(N, B)
    got = jax.jit(jax.vmap(gradients(tiled)))(q, k, v, segments())
    want = jax.lax.map(lambda x: gradients(exact)(*x), (q, k, v, segments()))
    for one, two in zip(got, want, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6)


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_vmap_adds_no_square_array_and_no_loop(what):
    form = tiled if what == "forward" else gradients(tiled)

    def text(function, *shape):
        ids = segments() if len(shape) == 2 else segments()[0]
        return jax.jit(function).lower(*arrays(*shape), ids).compile().as_text()

    alone, many = text(form, B), text(jax.vmap(form), N, B)
    room = -(-T // BLOCK) * BLOCK
    for length in (T, room):
        assert f"{length},{length}]" not in many
    # Blocks read at an index of their own for each run would be loops over the runs.
    assert many.count(" while(") == alone.count(" while(")
