"""What differs between the versions of jax that we support, in one place."""

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` differs from device to device inside `shard_map`."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", ()))


def vary_together(tree):
    """Let every array of a pytree vary over the union of their mesh axes.

    Inside `shard_map` an array that is the same on all devices of an axis (a bias
    beside sharded queries) then has the type of the others, so that loops can carry
    them side by side, and its gradient is summed over that axis on the way out.
    """
    arrays, rebuild = jax.tree.flatten(tree)
    union = frozenset().union(*map(varying_axes, arrays))
    if not union:
        return tree
    cast = [
        jax.lax.pcast(x, tuple(sorted(union - varying_axes(x))), to="varying")
        for x in arrays
    ]
    return rebuild.unflatten(cast)
