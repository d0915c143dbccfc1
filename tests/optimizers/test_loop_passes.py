"""``loop_passes`` counts the passes in a loop of a program written by hand."""

import jax
import pytest
from loop_passes import Passes, Step, passes_of

STACK = jax.ShapeDtypeStruct((4, 32, 64), "bfloat16")
ADDED = "added here"
PROGRAM = """
%cut (s: bf16[4,32,64], i: s32[]) -> (f32[], bf16[1,32,64]) {
  %s = bf16[4,32,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,32,64]{2,1,0} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,32,64}
  %sum = f32[] reduce(%slice, %zero), dimensions={0,1,2}, to_apply=%add
  ROOT %both = (f32[], bf16[1,32,64]{2,1,0}) tuple(%sum, %slice)
}

%sums (g: bf16[32,64]) -> f32[64] {
  %g = bf16[32,64]{1,0} parameter(0)
  %zero.1 = f32[] constant(0)
  ROOT %sums_of = f32[64]{0} reduce(%g, %zero.1), dimensions={0}, to_apply=%add
}

%write (w: bf16[4,32,64], i: s32[], g: bf16[32,64], old: bf16[1,32,64]) -> bf16[4,32,64] {
  %w = bf16[4,32,64]{2,1,0} parameter(0)
  ROOT %written = bf16[4,32,64]{2,1,0} dynamic-update-slice(%w, %old, %i)
}

%body (carry: (s32[], bf16[4,32,64], bf16[8,32], bf16[8,64])) -> (s32[], bf16[4,32,64], bf16[8,32], bf16[8,64]) {
  %carry = (s32[], bf16[4,32,64]{2,1,0}, bf16[8,32]{1,0}, bf16[8,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %stack = bf16[4,32,64]{2,1,0} get-tuple-element(%carry), index=1
  %x = bf16[8,32]{1,0} get-tuple-element(%carry), index=2
  %dy = bf16[8,64]{1,0} get-tuple-element(%carry), index=3
  %cut.1 = (f32[], bf16[1,32,64]{2,1,0}) fusion(%stack, %n), kind=kLoop, calls=%cut
  %layer = bf16[1,32,64]{2,1,0} get-tuple-element(%cut.1), index=1
  %flat = bf16[32,64]{1,0} bitcast(%layer)
  %dx = bf16[8,32]{1,0} dot(%dy, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %gradient = bf16[32,64]{1,0} dot(%x, %dy), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %moved = (bf16[32,64]{1,0:S(1)}, bf16[32,64]{1,0}, u32[]) copy-start(%gradient)
  %near = bf16[32,64]{1,0:S(1)} copy-done(%moved)
  %sums.1 = f32[64]{0} fusion(%near), kind=kInput, calls=%sums
  added here
  %new = bf16[4,32,64]{2,1,0} fusion(%stack, %n, %gradient, %layer), kind=kLoop, calls=%write
  ROOT %next = (s32[], bf16[4,32,64]{2,1,0}, bf16[8,32]{1,0}, bf16[8,64]{1,0}) tuple(%n, %new, %dx, %dy)
}
"""
LEAST = Passes(reads_of_gradient=2, reads_of_weights=2, writes_of_weights=1, stacks_copied=[], wide_copies=[])


@pytest.mark.parametrize(
    "line, counted",
    [
        ("", {}),
        ("%more = f32[64]{0} fusion(%gradient), kind=kInput, calls=%sums", {"reads_of_gradient": 3}),
        ("%more = f32[64]{0} fusion(%flat), kind=kInput, calls=%sums", {"reads_of_weights": 3}),
        ("%more = f32[4,32]{1,0} reduce(%stack, %n), dimensions={2}, to_apply=%add", {"reads_of_weights": 3}),
        ("%more = bf16[4,32,64]{2,1,0} fusion(%stack, %n, %x, %x), calls=%write", {"writes_of_weights": 2}),
        ("%more = bf16[4,64,32]{2,1,0} transpose(%new), dimensions={0,2,1}", {"stacks_copied": ["more"]}),
        ("%more = f32[32,64]{1,0} convert(%near)", {"reads_of_gradient": 3, "wide_copies": ["more"]}),
        ("%more = u32[32,64]{1,0} rng-bit-generator(%n), algorithm=rng_default", {"wide_copies": ["more"]}),
    ],
)
def test_what_is_added_to_a_program_is_counted(line, counted):
    step = Step(PROGRAM.replace(ADDED, line), [STACK], [])
    assert passes_of(step) == LEAST._replace(**counted)
