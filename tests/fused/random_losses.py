"""The parameters, the batches and the loss that a random program describes."""

import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from random_programs import DIM, ROWS, RandomProgram, Scan, Stack, Unrolled

TOKENS = 5
_LAYER_SHAPES = {"matrix": (DIM, DIM), "vector": (DIM,), "scalar": ()}
_CHECKPOINTS = {
    "none": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "policy": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def _normal(name: str, shape: tuple[int, ...], dtype: str, scale: float = 0.4) -> jax.Array:
    numbers = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape) * scale
    return jnp.asarray(numbers, dtype)


def stored_axis(stack: Stack, rank: int) -> int:
    """The layer axis of the parameter as it is stored."""
    return min(stack.axis, rank) if stack.axis >= 0 else rank


def parameters(program: RandomProgram) -> dict[str, Any]:
    """The parameters, by part of the program."""
    params: dict[str, Any] = {}
    for p, part in enumerate(program.parts):
        of_part = _of_scan(part) if isinstance(part, Scan) else {f"w{i}": (DIM, DIM) for i in range(part.layers)}
        params[f"part {p}"] = {
            name: x if not isinstance(x, tuple) else _normal(f"{p} {name}", x, program.whole_dtype)
            for name, x in of_part.items()
        }
    whole = {"tied": (TOKENS, DIM), "bias": (DIM,), "temperature": ()}
    if program.end == "head":
        whole["head"] = (DIM, TOKENS)
    params["whole"] = {name: _normal(name, shape, program.whole_dtype) for name, shape in whole.items()}
    if program.integers:
        params["integers"] = jnp.arange(3, dtype=jnp.int32)
    return params


def _of_scan(scan: Scan) -> dict[str, Any]:
    """The scan's own parameters."""
    params: dict[str, Any] = {}
    for i, stack in enumerate(scan.stacks):
        layer, layers = _stored_layer(scan, stack), _stored_layers(scan, stack)
        axis = stored_axis(stack, len(layer))
        shape = (*layer[:axis], layers, *layer[axis:])
        params[f"stack {i}"] = _normal(f"{i} {stack.kind}", shape, stack.dtype)
        if "gain" in stack.before:
            used = _layer_shape(scan, stack)
            params[f"gain {i}"] = 1 + _normal(f"{i} gain", (scan.length, *used), stack.dtype)
        if "gain of a layer" in stack.before:
            params[f"gain of a layer {i}"] = 1 + _normal(f"{i} gains", (scan.length,), stack.dtype)
    if "leaf" in scan.xs:
        params["scales"] = 1 + _normal("scales", (scan.length,), "float32")
    if "flags" in scan.xs:
        params["flags"] = jnp.arange(scan.length, dtype=jnp.int32) % 3
    return params


def _layer_shape(scan: Scan, stack: Stack) -> tuple[int, ...]:
    """The shape of one layer, as the scan reads it."""
    return (2,) * (scan.group != "none") + _LAYER_SHAPES[stack.kind]


def _shape_change(scan: Scan, stack: Stack) -> str:
    """The stack's change of shape, or "none" if the stack does not allow it."""
    layer, shape = _layer_shape(scan, stack), stack.shape
    if shape == "group":
        return shape if scan.group != "none" else "none"
    if shape.startswith(("reshape", "slice")) and not layer:
        return "none"
    if shape == "reshape before" and stack.axis == 1 and len(layer) > 0:
        return "reshape"
    return shape


def _stored_layer(scan: Scan, stack: Stack) -> tuple[int, ...]:
    layer, change = _layer_shape(scan, stack), _shape_change(scan, stack)
    if change.startswith("reshape"):
        return (int(np.prod(layer)),)
    if change.startswith("slice"):
        return (*layer[:-1], layer[-1] + 1)
    return layer[1:] if change == "group" else layer


def _stored_layers(scan: Scan, stack: Stack) -> int:
    change = _shape_change(scan, stack)
    return 2 * scan.length if change == "group" else scan.length + (change == "first layers")


def _prepare(scan: Scan, i: int, params: dict[str, Any], whole: dict[str, Any]) -> jax.Array:
    """The array that the scan runs over, made from the stored stack."""
    stack, w = scan.stacks[i], params[f"stack {i}"]
    axis, layer, change = stored_axis(stack, w.ndim - 1), _layer_shape(scan, stack), _shape_change(scan, stack)
    if change == "reshape before" and axis == 0:
        w = w.reshape(scan.length, *layer)
    elif change == "reshape before":
        w, axis = w.reshape(*layer, scan.length), len(layer)
    elif change == "slice before":
        dim = max(a for a in range(w.ndim) if a != axis)
        w = lax.slice_in_dim(w, 0, layer[-1], axis=dim)
    front = lambda w: _shaped(jnp.moveaxis(w, axis, 0), (scan.length, *layer), change)
    for n, operation in enumerate(stack.before):
        moves_later = n < stack.moved_after and not operation.startswith(("gain", "scale of", "flip", "cumsum"))
        if not moves_later and front is not None:
            w, front = front(w), None
        w = _apply(operation, w, i, params, whole)
    return w if front is None else front(w)


def _shaped(w: jax.Array, shape: tuple[int, ...], change: str) -> jax.Array:
    if change == "slice":
        return w[..., : shape[-1]]
    if change == "first layers":
        return w[: shape[0]]
    return w.reshape(shape) if change in ("reshape", "group") else w


def _apply(operation: str, w: jax.Array, i: int, params: dict[str, Any], whole: dict[str, Any]) -> jax.Array:
    of_layers = lambda x: x.reshape(-1, *[1] * (w.ndim - 1))
    if operation in ("bfloat16", "float32"):
        return w.astype(operation)
    if operation == "gain of a layer":
        return w * params[f"gain of a layer {i}"][(slice(None), *[None] * (w.ndim - 1))].astype(w.dtype)
    return {
        "negate": lambda: -w,
        "scale": lambda: 0.7 * w,
        "square": lambda: w - w * w,
        "tanh": lambda: jnp.tanh(w),
        "gain": lambda: w * params[f"gain {i}"].astype(w.dtype),
        "flip": lambda: w[::-1],
        "cumsum": lambda: 0.7 * jnp.cumsum(w, axis=0),
        "temperature": lambda: w * (1 + whole["temperature"]).astype(w.dtype),
        "scale of each layer": lambda: w * of_layers(jnp.linspace(0.5, 1.0, w.shape[0], dtype=w.dtype)),
    }[operation]()


def _norm(c: jax.Array) -> jax.Array:
    return c * lax.rsqrt(jnp.mean(c * c, axis=-1, keepdims=True) + 0.1)


def _use(use: str, kind: str, c: jax.Array, w: jax.Array, key: jax.Array) -> jax.Array:
    """One layer's operation with one parameter."""
    tanh = lambda c, w: (jnp.tanh(c @ w).astype(c.dtype), None)
    if kind != "matrix":
        w = 0.5 * w
        return {
            "scale": lambda: c * (1 + w),
            "shift": lambda: c + w,
            "norm": lambda: _norm(c) * (1 + w),
            "stop": lambda: c * (1 + w) + lax.stop_gradient(jnp.sum(w)),
        }[use]()
    return {
        "tanh": lambda: jnp.tanh(c @ w),
        "gated": lambda: c + jax.nn.sigmoid(c @ w) * c,
        "relu": lambda: c + jax.nn.relu(c @ w + 0.1),
        "norm": lambda: c + _norm(c) @ w,
        "stop": lambda: jnp.tanh(c @ w) + lax.stop_gradient(jnp.mean(w)),
        "cond on weight": lambda: lax.cond(w[0, 0] > 0, lambda c: jnp.tanh(c @ w), lambda c: c @ w, c),
        "cond on carry": lambda: lax.cond(jnp.sum(c) > 0, lambda c: jnp.tanh(c @ w), lambda c: c @ w, c),
        "inner scan": lambda: lax.scan(tanh, c, jnp.stack([w, w.T]))[0],
        "dropout": lambda: c + jnp.tanh(c @ w) * jax.random.bernoulli(key, 0.7, (DIM,)),
        "bfloat16 inside": lambda: c + jnp.tanh(c.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
    }[use]()


def _layer(scan: Scan, constant: jax.Array | None, carry: dict[str, Any], x: dict[str, Any]) -> tuple[dict, Any]:
    """The scan's body."""
    dtype, new = carry["c"].dtype, dict(carry)
    key = x.get("keys", carry.get("key", jax.random.key(2)))
    if "key" in carry:
        new["key"] = jax.random.fold_in(carry["key"], 1)

    def once(c: jax.Array, ws: list[jax.Array]) -> jax.Array:
        for w, stack in zip(ws, [s for s in scan.stacks for _ in range(1 + s.twice)]):
            c = _use(stack.use, stack.kind, c, w, key).astype(dtype)
        return c

    c = carry["c"]
    if scan.group == "scan":
        c = lax.scan(lambda c, ws: (once(c, ws), None), c, x["w"])[0]
    elif scan.group == "unrolled":
        c = once(once(c, [w[0] for w in x["w"]]), [w[1] for w in x["w"]])
    else:
        c = once(c, x["w"])
    if constant is not None:
        c = c + constant
    for name in ("leaf", "flags", "index"):
        c = c * (1 + 0.1 * x[name]) if name in x else c
    if "counter" in carry:
        c, new["counter"] = jnp.where(carry["counter"] % 2 == 0, c, 0.5 * c), carry["counter"] + 1
    squares = jnp.mean(jnp.square(x["w"][0].astype(jnp.float32)))
    if "accumulator" in carry:
        new["accumulator"] = carry["accumulator"] + squares
    new["c"] = c.astype(dtype)
    return new, {"none": None, "carry": c.astype(dtype), "weights": squares, "unused": c}[scan.ys]


def _run_scan(scan: Scan, params: dict[str, Any], whole: dict[str, Any], c: jax.Array, key: jax.Array) -> Any:
    """The carry after the scan, and the scan's part of the loss."""
    n = scan.length
    dtype = c.dtype
    prepare = lambda params: [_prepare(scan, i, params, whole) for i in range(len(scan.stacks))]

    def run(prepared: Any, params: dict[str, Any], whole: dict[str, Any], c: jax.Array) -> Any:
        ws = [_prepare(scan, i, params, whole) for i in range(len(scan.stacks))] if prepared is None else prepared
        x: dict[str, Any] = {"w": [w for w, s in zip(ws, scan.stacks) for _ in range(1 + s.twice)]}
        others = {
            "index": lambda: jnp.arange(n),
            "keys": lambda: jax.random.split(key, n),
            "leaf": lambda: params["scales"],
            "flags": lambda: params["flags"],
        }
        x |= {name: others[name]() for name in sorted(scan.xs)}
        begin = {"counter": jnp.int32(0), "accumulator": jnp.float32(0), "key": key}
        carry = {"c": c.astype(scan.carry_dtype)} | {name: begin[name] for name in sorted(scan.carry)}
        constants = {"none": None, "bias": whole["bias"], "tied": whole["tied"][0]}
        body = _CHECKPOINTS[scan.remat](partial(_layer, scan, constants[scan.constant]))
        return lax.scan(body, carry, x, reverse=scan.reverse, unroll=min(scan.unroll, n))

    inside = scan.prepared == "inside"
    carry, ys = _CHECKPOINTS[scan.around](run)(None if inside else prepare(params), params, whole, c)
    loss = carry.get("accumulator", 0.0)
    if scan.ys == "carry":
        loss += 0.1 * jnp.sum(jnp.mean(jnp.square(ys.astype(jnp.float32)), axis=-1), axis=0)
    elif scan.ys == "weights":
        loss += jnp.sum(ys)
    for i, stack in enumerate(scan.stacks):
        if stack.beside:
            loss += jnp.mean(jnp.square(params[f"stack {i}"].astype(jnp.float32)))
    return carry["c"].astype(dtype), loss


def _run_unrolled(part: Unrolled, params: dict[str, Any], c: jax.Array) -> jax.Array:
    one = lambda c, w: c + jnp.tanh(c @ w).astype(c.dtype)
    if part.remat not in ("none", "all at once"):
        one = _CHECKPOINTS[part.remat](one)

    def run(params: dict[str, Any], c: jax.Array) -> jax.Array:
        for w in params.values():
            c = one(c, w)
        return c

    run = jax.checkpoint(run) if part.remat == "all at once" else run
    return (jax.jit(run) if part.jit else run)(params, c)


def _of_examples(program: RandomProgram, params: Any, x: jax.Array, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """The loss of one example, or of each."""
    whole, loss = params["whole"], jnp.zeros(jnp.shape(tokens))
    c = whole["tied"][tokens] + x if program.begin == "embedding" else x
    c = c * (1 + whole["bias"]) if program.begin == "x times a leaf" else c
    c = c.astype(jnp.float32)
    for p, part in enumerate(program.parts):
        of_part = params[f"part {p}"]
        if isinstance(part, Unrolled):
            c = _run_unrolled(part, of_part, c)
            continue
        for n in range(1 + part.again):
            c, added = _run_scan(part, of_part, whole, c, jax.random.fold_in(key, 10 * p + n))
            c, loss = _norm(c), loss + added
    ends = {"head": lambda: c @ whole["head"], "tied": lambda: c @ whole["tied"].T, "none": lambda: c}
    y = ends[program.end]().astype(jnp.float32)
    if program.integers:
        y = y * params["integers"][1]
    return loss + jnp.mean(jnp.square(y - 0.3), axis=-1)


def loss_of(program: RandomProgram) -> Any:
    """``loss_fn(params, x, tokens, key)``."""

    def loss_fn(params: Any, x: jax.Array, tokens: jax.Array, key: jax.Array) -> Any:
        of = partial(_of_examples, program)
        of = jax.vmap(of, in_axes=(None, 0, 0, None)) if program.vmapped else of
        losses = of(params, x, tokens, key)
        loss = jnp.mean(losses) if program.options.reduction == "mean" else jnp.sum(losses)
        return (loss, {"losses": losses}) if program.options.has_aux else loss

    return loss_fn


def batch(i: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, tokens, and a key."""
    numbers = np.random.default_rng(i)
    tokens = jnp.asarray(numbers.integers(TOKENS, size=ROWS), jnp.int32)
    return _normal(f"x {i}", (ROWS, DIM), "float32", 1.0), tokens, jax.random.key(i)
