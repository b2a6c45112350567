"""Launching a kernel: grid, memory and what is pinned of the compiler."""

from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.kernels.compat import mosaic_gpu_kernel, vary_together
from attnjax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS

# Bytes of a row of shared memory that copies and matrix units permute within.
SWIZZLE = 128


def tile_memory(shape, dtype):
    """Shared memory for 16-bit tiles [..., rows, columns] that wgmma reads."""
    columns = SWIZZLE // 2
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def kernel(body, *, name, out_type, scratch, grid, interpret):
    """A kernel over `grid` = (heads, owners, batch) of two compute warpgroups and one
    that copies.

    Lowering semantics are pinned to "lane", since jax's default changed in 0.11.
    `approx_math` takes the hardware's tanh, exp and log, whose errors are below those
    of 16-bit weights.
    """
    params = plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
    call = mosaic_gpu_kernel(
        body,
        name=name,
        out_type=out_type,
        scratch=scratch,
        compiler_params=params,
        grid=grid,
        grid_names=("heads", "owners", "batch"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        interpret=interpret,
    )

    def run(first, *rest):
        # Results have lost the mesh axes over which the arguments vary.
        return vary_together((*call(first, *rest), first))[:-1]

    return run
