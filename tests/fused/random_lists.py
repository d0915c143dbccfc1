"""Random loops over lists of layers that are alike or nearly so: descriptions, and their losses and parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from lists_of_layers import DIM, LENGTH, apply, block, error, matrix

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu}
DEFAULTS = {
    "layers": 4,
    "period": ["relu"],
    "ends": (0, 0),
    "remat": "none",
    "extras": set(),
    "changes": {},
    "cast": False,
    "frozen": "none",
    "decoder": 0,
}
"""The values that a description has by default."""
EXTRAS = {
    "key": "carried, and split in each layer",
    "split": "keys that are split at first",
    "folded": "a key that the depth is folded into",
    "scale": "by depth, a float of Python's",
    "count": "an integer that grows",
    "residual": "the layer's input",
    "shared": "a matrix that all layers read",
    "mask": "what each token sees",
    "inputs": "the first layer's",
    "penalty": "a sum over layers",
    "before": "what the layer before received",
    "two before": "what the one before that received",
    "hidden": "all layers' outputs are read after the loop",
    "gates": "a parameter of which each layer reads a number",
    "table": "an array of numbers by depth",
    "order": "an array of integers by depth, which tokens go by",
    "adapters": "two narrow matrices",
}
CHANGES = {
    "activation": "another one",
    "derivative": "of a function, multiplied by two",
    "tie": "a matrix of the next layer's",
    "tied head": "the layer's matrix is read after the loop, too",
    "skip": "nothing is done",
    "twice": "the layer is applied twice",
    "remat": "there is none",
    "number": "another factor",
    "first output": "what the first layer made is read",
    "other mask": "another one",
    "other key": "the key of the first layer",
    "swap": "a parameter is reversed",
    "picked": "a mask by depth leaves this layer out",
    "wide": "matrices of another shape",
    "cast": "computed in another dtype",
    "frozen": "not trained",
}


@st.composite
def loops(draw: Any) -> dict[str, Any]:
    """A description: a period's activations, extra operations of each layer, and changes to single layers."""
    layers = draw(st.integers(3, 7))
    return {
        "layers": layers,
        "period": draw(st.lists(st.sampled_from([*ACTIVATIONS, "own derivative"]), min_size=1, max_size=3)),
        "ends": draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (1, 1), (2, 1)])),
        "remat": draw(st.sampled_from(["none", "layer", "part", "dots", "two", "loop"])),
        "extras": draw(st.sets(st.sampled_from(list(EXTRAS)), max_size=4)),
        "changes": draw(st.dictionaries(st.integers(0, layers - 1), st.sampled_from(list(CHANGES)), max_size=2)),
        "cast": draw(st.booleans()),
        "frozen": draw(st.sampled_from(["none", "none", "matrices", "adapters alone"])),
        "decoder": draw(st.sampled_from([0, 0, 0, 2, 3])),
    }


def params_of(loop: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a description's loss is called with."""
    layers = [block(i) for i in range(loop["layers"])]
    for i, change in loop["changes"].items():
        if change == "wide":
            layers[i] |= {"up": matrix(70 + i, DIM, 3 * DIM), "down": 0.3 * matrix(80 + i, 3 * DIM, DIM)}
    adapters = [{"a": matrix(30 + i, DIM, 2), "b": 0.1 * matrix(40 + i, 2, DIM)} for i in range(loop["layers"])]
    decoder = [block(10 + i) | {"read": matrix(20 + i, DIM, DIM)} for i in range(loop["decoder"])]
    gates = jnp.linspace(0.5, 1.0, loop["layers"])
    others = {"shared": matrix(60, DIM, DIM), "into": matrix(200, DIM, DIM), "head": matrix(201, DIM, DIM)}
    return {"layers": layers, "adapters": adapters, "decoder": decoder, "gates": gates, **others}


def trainable_of(loop: dict[str, Any]) -> Callable[[str], bool]:
    """A function that says whether the parameter at a path is trained."""
    frozen = {f"layers/{i}" for i, change in loop["changes"].items() if change == "frozen"}

    def is_trained(path: str) -> bool:
        part, *rest = path.split("/")
        if "/".join((part, *rest[:1])) in frozen or (loop["frozen"] == "matrices" and rest[-1:] in (["up"], ["down"])):
            return False
        return loop["frozen"] != "adapters alone" or part in ("adapters", "into")

    return is_trained


def with_derivative(factor: float) -> Callable[[jax.Array], jax.Array]:
    """The hyperbolic tangent, with its derivative multiplied by a factor."""
    fn = jax.custom_vjp(jnp.tanh)
    fn.defvjp(lambda x: (jnp.tanh(x), x), lambda x, d: (factor * d / jnp.cosh(x) ** 2,))
    return fn


def loss_of(loop: dict[str, Any]) -> Callable[..., jax.Array]:
    """A description's loss, a function of parameters, inputs and a key."""
    n, changes = loop["layers"], loop["changes"]

    def loss(params, x, key):
        if loop["cast"]:
            params = jax.tree.map(lambda w: (w * 1.0).astype(jnp.float32), params)
        given = {"x": x @ params["into"], "key": key, "keys": jax.random.split(key, n)}
        given["mask"] = jnp.tril(jnp.ones((LENGTH, LENGTH)))
        run = jax.checkpoint(_run, static_argnums=0) if loop["remat"] == "loop" else _run
        x, total, hidden = run(_Static(loop), params, given)
        if "hidden" in loop["extras"]:
            total += sum(error(y) * (i + 1) for i, y in enumerate(hidden))
        source = x
        for p in params["decoder"]:
            x = apply(p, x)
            x = x + jax.nn.softmax(x @ source.swapaxes(-1, -2)) @ source @ p["read"]
        head = params["head"]
        for i, change in changes.items():
            if change == "tied head":
                head = head + params["layers"][i]["up"][:, :DIM]
        return error(x @ head) + total

    return loss


class _Static:
    """A description as an argument that is not an array."""

    def __init__(self, loop: dict[str, Any]):
        self.loop = loop


def _run(static: _Static, params: dict[str, Any], given: dict[str, Any]) -> tuple[jax.Array, Any, list[jax.Array]]:
    """The last layer's output, the penalty, and all layers' outputs."""
    loop, n = static.loop, static.loop["layers"]
    state = {"x": given["x"], "before": given["x"], "two before": given["x"], "key": given["key"]}
    state |= {"total": jnp.float32(0), "seen": 0, "first": None}
    hidden: list[jax.Array] = []
    at_once = 2 if loop["remat"] == "two" else 1
    for start in range(0, n, at_once):
        several = range(start, min(n, start + at_once))

        def layers(state, several=several):
            outputs = []
            for i in several:
                state = _layer(loop, i, params, given, state)
                outputs.append(state["x"])
            return state, outputs

        seen = state.pop("seen")
        with_seen = lambda state, layers=layers, seen=seen: _without_seen(layers(state | {"seen": seen}))
        state, outputs = jax.checkpoint(with_seen)(state) if loop["remat"] == "two" else with_seen(state)
        state["seen"] = seen + len(several)
        hidden += outputs
    return state["x"], state["total"], hidden


def _without_seen(result: tuple[dict[str, Any], Any]) -> tuple[dict[str, Any], Any]:
    state, outputs = result
    return {name: x for name, x in state.items() if name != "seen"}, outputs


def _layer(
    loop: dict[str, Any], i: int, params: dict[str, Any], given: dict[str, Any], state: dict[str, Any]
) -> dict[str, Any]:
    """The state that a layer hands on."""
    n, extras, change = loop["layers"], loop["extras"], loop["changes"].get(i)
    p, x, key, total = params["layers"][i], state["x"], state["key"], state["total"]
    if change == "tie":
        p = p | {"up": params["layers"][(i + 1) % n]["up"], "down": params["layers"][(i + 1) % n]["down"]}
    if change == "swap":
        p = p | {"scale": p["scale"][::-1]}
    if change == "cast":
        p = p | {"down": p["down"].astype(jnp.bfloat16).astype(jnp.float32)}
    one = _block(loop, i)
    y = one(p, x)
    y = one(p, y) if change == "twice" else y
    y = x if change == "skip" else y
    drop = lambda key, y: y * jax.random.bernoulli(key, 0.8, y.shape)
    if "key" in extras:
        key, own = jax.random.split(key)
        y = drop(own, y)
    if "split" in extras:
        y = drop(given["keys"][0 if change == "other key" else i], y)
    if "folded" in extras:
        y = drop(jax.random.fold_in(given["key"], 0 if change == "other key" else i), y)
    if "scale" in extras:
        y = y * (1.0 + (0.5 if change == "number" else 0.1) * i)
    if "residual" in extras:
        y = y + x
    if "shared" in extras:
        y = y + 0.1 * jnp.tanh(y @ params["shared"])
    if "adapters" in extras:
        y = y + x @ params["adapters"][i]["a"] @ params["adapters"][i]["b"]
    if "mask" in extras:
        seen_by = given["mask"] if change != "other mask" else given["mask"].T
        y = y + jax.nn.softmax(jnp.where(seen_by > 0, y @ y.swapaxes(-1, -2), -1e9)) @ y
    if "inputs" in extras:
        y = y + 0.1 * given["x"]
    if "penalty" in extras:
        total = total + jnp.mean(jnp.abs(y))
    if "count" in extras:
        y = y + 0.01 * (state["seen"] + 1)
    if "gates" in extras:
        y = y * params["gates"][i]
    if "table" in extras:
        y = y * jnp.asarray(np.linspace(0.5, 1.5, n), jnp.float32)[i]
    if "order" in extras:
        y = y[:, jnp.asarray((np.arange(LENGTH)[None] + np.arange(n)[:, None]) % LENGTH)[i]]
    if "before" in extras:
        y = y + 0.1 * state["before"]
    if "two before" in extras:
        y = y + 0.1 * state["two before"]
    if change == "first output" and state["first"] is not None:
        y = y + state["first"]
    if picked := [k for k, other in loop["changes"].items() if other == "picked"]:
        y = jnp.where((jnp.arange(n) == picked[0])[i], x, y)
    y = y / (1.0 + jnp.sqrt(jnp.mean(jnp.square(y))))
    first = y if state["first"] is None else state["first"]
    return {
        "x": y,
        "before": x,
        "two before": state["before"],
        "key": key,
        "total": total,
        "seen": state["seen"] + 1,
        "first": first,
    }


def _block(loop: dict[str, Any], i: int) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
    """The layer itself."""
    change, (begin, end) = loop["changes"].get(i), loop["ends"]
    name = loop["period"][(i - begin) % len(loop["period"])]
    if i < begin or i >= loop["layers"] - end:
        name = "sin"
    if change == "activation":
        name = "silu" if name != "silu" else "relu"
    factor = 2.0 if change == "derivative" else 1.0
    if name == "own derivative" or change == "derivative":
        fn = with_derivative(factor)
    else:
        fn = {**ACTIVATIONS, "sin": jnp.sin}[name]
    one = lambda p, x: apply(p, x, fn)
    if change == "remat" or loop["remat"] in ("none", "two", "loop"):
        return one
    if loop["remat"] == "part":
        return lambda p, x: x + jax.checkpoint(lambda p, x: fn(x @ p["up"]) @ p["down"])(p, x * p["scale"])
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if loop["remat"] == "dots" else None
    return jax.checkpoint(one, policy=policy)
