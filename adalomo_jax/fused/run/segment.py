"""Runs some equations forward and pulls them back as one: once, or in a loop over the microbatches.

Values that differ between microbatches have a leading microbatch axis; cotangents of the others are summed over it, in
float32. Residuals that are inputs, which the backward pass can read again, are recognized and not saved.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from adalomo_jax.barriers import after
from adalomo_jax.fused.plan.jaxpr import Program, evaluate
from adalomo_jax.fused.plan.plan import Segment
from adalomo_jax.fused.run.cotangents import Cotangents, pull
from adalomo_jax.optimizers.kept import is_kept
from adalomo_jax.optimizers.precision import add, promoted


class Context(NamedTuple):
    """What all segments of a program, or of a scan's body, share."""

    program: Program
    active: Collection[int]
    """The values that depend on a trained parameter."""
    batched: Collection[int]
    """The values that differ between microbatches."""
    microbatches: int | None
    again: Collection[int]
    """The values that the backward pass will have again."""
    offloads: bool = False
    """Whether to put the residuals of a scan's layers into host memory."""


class Source(NamedTuple):
    """Where the backward pass finds a residual."""

    kind: str
    """``"input"`` of the segment, ``"saved"`` by the forward pass, or a ``"constant"``."""
    key: Any
    """The number of the input, the position among the saved residuals, or the constant."""


class Layout(NamedTuple):
    """How residuals make a pullback."""

    treedef: Any
    sources: list[Source]
    once: tuple[int, ...]
    """The inputs that are saved once for all microbatches."""


class Residuals(NamedTuple):
    """What the forward pass saved for the backward pass."""

    once: dict[int, Any]
    saved: list[Any]
    """With a leading microbatch axis if the segment runs for each microbatch."""


def forward(segment: Segment, context: Context, values: dict[int, Any]) -> tuple[Residuals, Layout]:
    """Runs the segment on ``values``, adds its results to them, and returns what `backward` needs."""
    shared, of_batch = _inputs(segment, context, values)
    layouts: list[Layout] = []

    def run(of_batch: dict[int, Any]) -> tuple[dict[int, Any], list[Any]]:
        outputs, pullback = _vjp(segment, context, shared | of_batch)
        saved, layout = _take_apart(pullback, segment, context, shared, of_batch)
        layouts.append(layout)
        return outputs, saved

    if segment.batched:
        _, (outputs, saved) = lax.scan(lambda _, x: (None, run(x)), None, of_batch, length=context.microbatches)
    else:
        outputs, saved = run(of_batch)
    values.update(outputs)
    layout = layouts[-1]
    return Residuals({v: shared[v] for v in layout.once}, saved), layout


def backward(
    segment: Segment,
    context: Context,
    tape: tuple[Residuals, Layout],
    values: Mapping[int, Any],
    cotangents: Cotangents,
) -> Cotangents:
    """Pulls the segment back: cotangents of its inputs, given those of its outputs, as far as these have any."""
    residuals, layout = tape
    d_outputs = {v: cotangents[v] for v in segment.outputs if v in cotangents}
    if not d_outputs:
        return {}
    there = {v: floats_after(values[v], d_outputs) for v in segment.inputs if v in context.again}

    def pull(of_batch: tuple[dict[int, Any], list[Any], Cotangents]) -> tuple[None, Cotangents]:
        again, saved, d_outputs = of_batch
        pullback = _put_together(layout, there | residuals.once | again, saved)
        return None, _pull(pullback, segment, context, d_outputs)

    of_batch = {v: x for v, x in there.items() if segment.batched and v in context.batched}
    return _for_each_microbatch(pull, (of_batch, residuals.saved, d_outputs), segment, context, d_outputs)[1]


def forward_and_backward(
    segment: Segment, context: Context, values: dict[int, Any], cotangents: Cotangents
) -> Cotangents:
    """Runs the last segment and pulls it back at once: no microbatch's residuals wait for another microbatch."""
    shared, of_batch = _inputs(segment, context, values)
    d_outputs = {v: cotangents[v] for v in segment.outputs if v in cotangents}

    def run(of_batch: tuple[dict[int, Any], Cotangents]) -> tuple[dict[int, Any], Cotangents]:
        outputs, pullback = _vjp(segment, context, shared | of_batch[0])
        return outputs, _pull(pullback, segment, context, of_batch[1])

    outputs, d_inputs = _for_each_microbatch(run, (of_batch, d_outputs), segment, context, d_outputs)
    values.update(outputs)
    return d_inputs


def zeros(context: Context, v: int) -> jax.Array:
    """Zeros like a value, for each microbatch if it differs between them."""
    leading = (context.microbatches or 1,) if v in context.batched else ()
    return context.program.zeros(v, leading)


def zero_sum(context: Context, v: int) -> jax.Array:
    """Zeros to sum a value's cotangents into; for sums over microbatches, in float32."""
    if context.microbatches is None or v in context.batched:
        return zeros(context, v)
    return context.program.zeros(v, dtype=sum_dtype(context, v))


def sum_dtype(context: Context, v: int) -> Any:
    """The dtype of a value's cotangents: at least float32 for sums over microbatches."""
    dtype = context.program.avals[v].dtype
    is_sum = context.microbatches is not None and v not in context.batched
    return promoted(dtype, jnp.float32) if is_sum else dtype


def _for_each_microbatch(
    fn: Callable[[Any], tuple[Any, Cotangents]], of_batch: Any, segment: Segment, context: Context, known: Cotangents
) -> tuple[Any, Cotangents]:
    """``fn`` of each microbatch: what it returns, stacked, and its cotangents, stacked or summed in float32.

    The zeros that they are written to wait until the outputs' cotangents are ``known``: otherwise XLA may make the
    zeros of all segments at once.
    """
    if not segment.batched:
        return fn(of_batch)
    active = [v for v in segment.inputs if v in context.active]
    stacked = [v for v in active if v in context.batched]

    def iteration(written: Cotangents, i_and_batch: Any) -> tuple[Cotangents, Any]:
        i, of_batch = i_and_batch
        outputs, d = fn(of_batch)
        rows = {v: lax.dynamic_update_index_in_dim(written[v], d[v], i, 0) for v in stacked}
        return rows | {v: add(written[v], d[v]) for v in active if v not in rows}, outputs

    start = {v: after(zero_sum(context, v), known) for v in active}
    d_inputs, outputs = lax.scan(iteration, start, (jnp.arange(context.microbatches), of_batch))
    return outputs, d_inputs


def floats_after(x: Any, computed: Any) -> Any:
    """The floats of a weight in another form, decoded once some arrays are computed; any other value as it is.

    Otherwise XLA may decode all weights at the start, or keep the floats from the forward pass for the backward pass.
    """
    return jax.tree.map(lambda part: after(part, computed), x).floats() if is_kept(x) else x


def _inputs(segment: Segment, context: Context, values: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """The segment's inputs: those that are the same for each microbatch, and those that differ."""
    given = {*context.program.inputs, *context.program.constants}
    made = [values[v] for v in segment.inputs if v not in given]
    read = {v: floats_after(values[v], made) for v in segment.inputs}
    of_batch = {v: x for v, x in read.items() if segment.batched and v in context.batched}
    return {v: x for v, x in read.items() if v not in of_batch}, of_batch


def _vjp(segment: Segment, context: Context, read: Mapping[int, Any]) -> tuple[dict[int, Any], Any]:
    """The outputs, and the pullback from cotangents of the active outputs to those of the active inputs."""

    def run(active_inputs: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        values = dict(read) | active_inputs
        evaluate(segment.equations, values)
        active = {v: values[v] for v in segment.outputs if v in context.active}
        return active, {v: values[v] for v in segment.outputs if v not in active}

    active_inputs = {v: x for v, x in read.items() if v in context.active}
    active, pullback, passive = jax.vjp(run, active_inputs, has_aux=True)
    return active | passive, pullback


def _pull(pullback: Any, segment: Segment, context: Context, cotangents: Cotangents) -> Cotangents:
    """Cotangents of the active inputs, given those of some outputs; other outputs' cotangents are zero."""
    active = [v for v in segment.outputs if v in context.active]
    d_outputs = {v: cotangents[v] if v in cotangents else context.program.zeros(v) for v in active}
    return pull(pullback, d_outputs, {v: context.program.avals[v].dtype for v in active})


def _take_apart(
    pullback: Any, segment: Segment, context: Context, shared: Mapping[int, Any], of_batch: Mapping[int, Any]
) -> tuple[list[Any], Layout]:
    """The residuals to save, and how they make the pullback together with values that the backward pass has again.

    A residual that *is* an input need not be saved: JAX keeps the very value that the segment received.
    """
    residuals, treedef = jax.tree.flatten(pullback)
    there = {id(x): v for v, x in {**shared, **of_batch}.items() if v in context.again}
    once = {id(x): v for v, x in shared.items() if segment.batched and v not in context.again}
    inputs = once | there
    saved: dict[int, Any] = {}
    sources = []
    for x in residuals:
        if id(x) in inputs:
            sources.append(Source("input", inputs[id(x)]))
        elif isinstance(x, Tracer):
            saved.setdefault(id(x), x)
            sources.append(Source("saved", list(saved).index(id(x))))
        else:
            sources.append(Source("constant", x))
    kept_once = {source.key for source in sources if source.kind == "input"}.intersection(once.values())
    return list(saved.values()), Layout(treedef, sources, tuple(sorted(kept_once)))


def _put_together(layout: Layout, inputs: Mapping[int, Any], saved: Sequence[Any]) -> Any:
    """The pullback, made again from its residuals."""
    find = {"input": inputs.__getitem__, "saved": saved.__getitem__, "constant": lambda x: x}
    return jax.tree.unflatten(layout.treedef, [find[kind](key) for kind, key in layout.sources])
