"""The weight map that docs/kernels.md shows how to write: it is short, and right."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import kernels
from attnjax.kernels import blocked

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "kernels.md"
FORMS = {
    "one tile": blocked.run,
    "blocks": functools.partial(blocked.run, block_sizes=(4, 4)),
}


def example():
    """The page's code with a class in it, run; its lines and its names."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "class " in block]
    names = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), names)
    return code.splitlines(), names


def test_a_weight_map_takes_less_than_forty_lines():
    lines, names = example()
    assert len(lines) < 40
    assert names["spec"].weight_map.power == 3


def test_the_weight_map_of_the_page_has_its_gradient():
    spec = example()[1]["spec"]
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 11, 2, 3)) for i in range(3))

    def dense(q, k, v):
        s = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(3)
        u = jnp.where(np.tri(11, dtype=bool), 1 / (1 + jnp.exp(-s)) ** 3, 0)
        return jnp.einsum("bhts,bshd->bthd", u / u.sum(-1, keepdims=True), v)

    def ours(form, q, k, v):
        request = kernels.make_request(q, k, v, spec, {}, kernels.default_target())
        return FORMS[form](request, q, k, v, {})[0]

    def grads(attend):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2))(q, k, v)

    wanted = grads(dense)
    for form in FORMS:
        for left, right in zip(
            grads(functools.partial(ours, form)), wanted, strict=True
        ):
            np.testing.assert_allclose(left, right, atol=2e-6)
