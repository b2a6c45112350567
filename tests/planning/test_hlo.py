"""Costs read from compiled modules, against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from attnjax.planning import hlo

LAYERS, ROWS, WIDTH = 5, 7, 64


def _module(function, *shapes):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def _scan(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_products_in_a_scan_count_as_often_as_they_run():
    module = _module(_scan, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    costs = hlo.costs(module)
    one = 2 * ROWS * WIDTH * WIDTH
    assert costs.flops == LAYERS * one
    assert costs.once[0] == one
    assert costs.unknown_loops == 0


def test_nested_scans_multiply():
    def twice(w, x):
        return jax.lax.scan(lambda x, _: (_scan(w, x), None), x, None, length=3)[0]

    module = _module(twice, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    assert hlo.costs(module).flops == 3 * LAYERS * 2 * ROWS * WIDTH * WIDTH


def test_a_gradient_takes_twice_the_products_of_the_pass():
    def loss(w, x):
        return jnp.sum(x @ w @ w)

    module = _module(jax.grad(loss, argnums=(0, 1)), (WIDTH, WIDTH), (ROWS, WIDTH))
    one = 2 * ROWS * WIDTH * WIDTH
    # Forward only the first product is needed; backward four.
    assert hlo.costs(module).flops in (5 * one, 6 * one)


def test_sliced_weights_count_once_in_all():
    module = _module(_scan, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    weights = 4 * LAYERS * WIDTH * WIDTH
    assert weights <= hlo.costs(module).bytes < 4 * weights


def test_loops_of_unknown_length_are_told():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ x, x)

    assert hlo.costs(_module(until, (WIDTH, WIDTH))).unknown_loops == 1


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,5]{1,0}", 60),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(f32[2]{0}, /*index=1*/s8[3]{0})", 11),
        ("pred[7]{0}", 7),
        ("f32[]", 4),
        ("f8e4m3fn[16]{0}", 16),
        ("s4[6]{0}", 3),
    ],
)
def test_sizes_of_shapes(shape, size):
    assert hlo.num_bytes(shape) == size


TPU = """HloModule m, is_scheduled=true

%cond (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.1 = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p.1), index=1
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %c = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %t = (s32[]{:T(128)}, f32[8,8]{1,0}) tuple(%i.1, %c)
}

ENTRY %main (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[8,8]{1,0}) while(%a), condition=%cond, body=%body
}
"""


def test_tpu_loops_get_their_length_from_the_condition():
    module = hlo.parse(TPU)
    assert hlo.costs(module).flops == 6 * 2 * 8 * 8 * 8


@pytest.mark.parametrize(
    ("attributes", "left", "right", "out", "products"),
    [
        # x [11, 7] @ w [7, 13]
        ("dim_labels=bf_io->bf", (11, 7), (7, 13), (11, 13), 11 * 7 * 13),
        # A batch of 4 x 5 products, as holes in the input.
        (
            "window={size=4x5 stride=3x4 lhs_dilate=4x5}, dim_labels=01bf_01io->01bf",
            (4, 5, 11, 7), (4, 5, 7, 13), (4, 5, 11, 13), 20 * 11 * 7 * 13,
        ),
        # One input, 4 kernels, as padding: each output meets one entry.
        (
            "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->0fb",
            (11, 7, 1), (4, 13, 7), (4, 13, 11), 4 * 11 * 7 * 13,
        ),
        # A sum over 4 products.
        (
            "window={size=4}, dim_labels=0fb_0io->bf0",
            (4, 7, 11), (4, 7, 13), (11, 13, 1), 4 * 11 * 7 * 13,
        ),
        # A causal convolution of width 3 over 9 steps: the first two lack taps.
        (
            "window={size=3 pad=2_0}, dim_labels=b0f_0io->b0f",
            (2, 9, 7), (3, 7, 13), (2, 9, 13), 2 * 7 * 13 * (1 + 2 + 7 * 3),
        ),
    ],
)  # fmt: skip
def test_products_of_convolutions_leave_out_padding_and_holes(
    attributes, left, right, out, products
):
    assert hlo.convolution_products(attributes, left, right, out) == products


STACKS = """HloModule m

FileNames
1 "/a/models/block.py"
2 "/a/kernels/dispatch.py"

FunctionNames
1 "run"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7}
2 {file_name_id=2 function_name_id=1 line=9}

StackFrames
1 {file_location_id=1 parent_frame_id=PARENT1}
2 {file_location_id=2 parent_frame_id=PARENT2}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} negate(%x), metadata={op_name="a" stack_frame_id=1}
  ROOT %z = f32[8]{0} negate(%y), metadata={op_name="b" stack_frame_id=2}
}
"""


@pytest.mark.parametrize("parents", ["01", "12"])
def test_traffic_is_told_apart_by_the_file_that_traced_it(parents):
    text = STACKS.replace("PARENT1", parents[0]).replace("PARENT2", parents[1])
    module = hlo.parse(text)
    assert hlo.costs(module, "kernels/dispatch.py").apart == 64
    assert hlo.costs(module, "models/block.py").apart == 128
    assert hlo.costs(module).apart == 0
    assert hlo.costs(module).bytes == 128


def test_a_compiled_module_names_the_files_that_traced_it():
    module = _module(_scan, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    assert hlo.costs(module, "test_hlo.py").apart > 0
    assert hlo.costs(module, "nowhere.py").apart == 0


@pytest.mark.parametrize("target", ["tpu_custom_call", "mosaic_gpu_v2"])
def test_kernels_whose_products_are_not_counted_are_told(target):
    call = f'custom-call(%y), custom_call_target="{target}"'
    text = STACKS.replace("negate(%y)", call)
    assert hlo.costs(hlo.parse(text)).kernels == 1
    assert hlo.costs(hlo.parse(STACKS)).kernels == 0
