"""Gradients, rematerialisation, the scan over layers, and eight devices.

Three programs serve all of it: two layers written one after the other, the same
two as a scan of rematerialised bodies, and that scan sharded over eight devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnjax.conformance import samples
from attnjax.conformance.expect import (
    NotApplicableError,
    expect,
    expect_changed,
    expect_equal,
    expect_finite,
    expect_trees_equal,
    wide,
)
from attnjax.conformance.subject import Subject, jitted

BATCH = 8


class Stacked:
    """Two layers of a Subject in residual form, as loss and gradients."""

    def __init__(self, s: Subject):
        self.s = s
        self.x, self.ctx = samples.sample(s, "packed", batch=BATCH)
        rng = np.random.default_rng(6)
        weight = rng.normal(size=self.x.shape)
        if self.ctx.segment_ids is not None:
            weight = weight * (self.ctx.segment_ids != 0)[..., None]
        self.weight = weight.astype(self.x.dtype)
        self.unrolled = jitted(self._grad_of(self._run_unrolled))
        self.scanned = jitted(self._grad_of(self._run_scanned))

    @functools.cached_property
    def by_hand(self):
        """(loss, outputs), gradients of the layers one after the other."""
        return self.unrolled(*self.arguments)

    @functools.cached_property
    def by_scan(self):
        """The same of the scan of rematerialised layers."""
        return self.scanned(*self.arguments)

    @property
    def arguments(self):
        """(params, x, embeddings), buffers, ctx, weight."""
        params, buffers = self.s.layers
        differentiable = (params, self.x, self.ctx.embeddings)
        return differentiable, buffers, self.ctx, self.weight

    def _grad_of(self, run):
        def loss(differentiable, buffers, ctx, weight):
            params, x, embeddings = differentiable
            ctx = ctx.replace(embeddings=embeddings)
            y, losses, new_buffers = run(params, buffers, x, ctx)
            total = jnp.sum(weight * y) + sum(jnp.sum(v) for v in losses.values())
            return total, (y, losses, new_buffers)

        return jax.value_and_grad(loss, has_aux=True)

    def _layer(self, x, layer, ctx):
        params, buffers, index = layer
        here = ctx.replace(
            layer_index=index, prng_key=jax.random.fold_in(ctx.prng_key, index)
        )
        y, out, buffers = self.s.call((params, buffers), x, here)
        return x + y, (out.losses, buffers)

    def _run_unrolled(self, params, buffers, x, ctx):
        outs = []
        for i in range(2):
            at = jax.tree.map(lambda a, i=i: a[i], (params, buffers))
            x, out = self._layer(x, (*at, jnp.int32(i)), ctx)
            outs.append(out)
        losses, buffers = jax.tree.map(lambda *a: jnp.stack(a), *outs)
        return x, losses, buffers

    def _run_scanned(self, params, buffers, x, ctx):
        body = jax.checkpoint(
            lambda x, layer: self._layer(x, layer, ctx), prevent_cse=False
        )
        xs = (params, buffers, jnp.arange(2, dtype=jnp.int32))
        x, (losses, buffers) = jax.lax.scan(body, x, xs)
        return x, losses, buffers


def stacked(s: Subject) -> Stacked:
    """The Stacked of a Subject, made once."""
    if not hasattr(s, "stacked"):
        s.stacked = Stacked(s)
    return s.stacked


def parameter_gradients(s: Subject) -> None:
    """Every parameter of both layers has a finite gradient that is not zero."""
    _, (grads, _, _) = stacked(s).by_hand
    explained = s.settings.no_gradient
    dead = []
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        expect_finite(grad, f"the gradient of {where} must be finite")
        if any(re.search(pattern, where) for pattern in explained):
            continue
        dead += [
            f"{where} (layer {i})" for i in range(2) if not np.any(wide(grad[i]) != 0)
        ]
    expect(
        not dead,
        f"every parameter must have a gradient; got zero for {', '.join(dead)}. "
        'Use it, remove it, or say why in CONFORMANCE["no_gradient"].',
    )


def input_gradients(s: Subject) -> None:
    """x has a finite gradient, and none flows into padding."""
    st = stacked(s)
    _, (_, grad, embeddings) = st.by_hand
    expect_finite(grad, "the gradient of x must be finite")
    expect_finite(embeddings, "the gradient of ctx.embeddings must be finite")
    # The residual carries st.weight to x whatever the mixer does.
    expect_changed(grad, st.weight, "x must have a gradient through the mixer")
    if st.ctx.segment_ids is not None:
        pad = st.ctx.segment_ids == 0
        for one in (grad, embeddings):
            expect_equal(
                wide(one)[pad],
                np.zeros_like(wide(one)[pad]),
                "the gradient into padding must be zero",
                atol=1e-7,
            )


def gradient_is_the_derivative(s: Subject) -> None:
    """The gradient predicts the change of the loss along a direction."""
    if s.settings.not_the_derivative:
        raise NotApplicableError(s.settings.not_the_derivative)
    st = stacked(s)
    (at, *rest), (_, grads) = st.arguments, st.by_hand
    rng = np.random.default_rng(8)
    direction = jax.tree.map(
        lambda a: (
            rng.normal(size=a.shape).astype(np.float32)
            if jnp.issubdtype(a.dtype, jnp.floating)
            else np.zeros(a.shape, a.dtype)
        ),
        at,
    )
    slope = sum(
        float(np.sum(wide(g) * wide(d)))
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    step = 1e-3

    def loss(sign):
        moved = jax.tree.map(lambda a, d: a + sign * step * d, at, direction)
        return float(st.unrolled(moved, *rest)[0][0])

    # Differences of two step lengths cancel the cubic term.
    near = (loss(1) - loss(-1)) / (2 * step)
    far = (loss(2) - loss(-2)) / (4 * step)
    found = (4 * near - far) / 3
    size = max(abs(slope), abs(found), 1.0)
    expect(
        abs(found - slope) <= 0.03 * size,
        "the gradient must be the derivative of the output; along a direction it "
        f"says {slope:.5g}, differences of the loss say {found:.5g}.",
    )


def scan_and_remat(s: Subject) -> None:
    """A scan of rematerialised layers gives the values and gradients of the layers."""
    st = stacked(s)
    (loss, aux), grads = st.by_hand
    (scan_loss, scan_aux), scan_grads = st.by_scan
    rule = "a rematerialised scan over layers must give what the layers give"
    expect_equal(scan_loss, loss, f"{rule}: loss", atol=1e-5)
    expect_trees_equal(scan_aux, aux, f"{rule}: outputs", atol=1e-5)
    expect_trees_equal(scan_grads, grads, f"{rule}: gradients", atol=1e-4)


def eight_devices(s: Subject) -> None:
    """The batch over eight devices gives what one device gives."""
    devices = jax.devices()
    if len(devices) < BATCH:
        raise NotApplicableError(
            f"needs {BATCH} devices, here are {len(devices)}; on a CPU set "
            f"jax_num_cpu_devices={BATCH} before jax starts"
        )
    st = stacked(s)
    (loss, aux), grads = st.by_scan
    mesh = jax.sharding.Mesh(np.array(devices[:BATCH]), ("data",))

    def place(a):
        has_batch = np.ndim(a) > 1 and np.shape(a)[0] == BATCH
        spec = PartitionSpec("data") if has_batch else PartitionSpec()
        return jax.device_put(a, NamedSharding(mesh, spec))

    (params, x, embeddings), buffers, ctx, weight = st.arguments
    everywhere = NamedSharding(mesh, PartitionSpec())
    params, buffers = jax.device_put((params, buffers), everywhere)
    x, embeddings, ctx, weight = jax.tree.map(place, (x, embeddings, ctx, weight))
    (loss_8, aux_8), grads_8 = st.scanned((params, x, embeddings), buffers, ctx, weight)
    rule = "eight devices must give what one gives"
    expect_equal(loss_8, loss, f"{rule}: loss", atol=1e-5)
    expect_trees_equal(aux_8, aux, f"{rule}: outputs", atol=1e-5)
    expect_trees_equal(grads_8, grads, f"{rule}: gradients", atol=1e-4)
