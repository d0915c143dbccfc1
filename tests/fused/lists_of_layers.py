"""Losses of models with layers in Python lists, as people write them, and of models that only look like it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adalomo_jax import fuse
from adalomo_jax.fused.plan.runs import FEWEST

DIM, LENGTH, BATCH = 8, 5, 2

fuse_lists = partial(fuse, roll=FEWEST)
"""Stacks even the few layers of the models here, most without checkpoints, which `fuse` leaves in lists by default."""


class ListModel(NamedTuple):
    """A loss, its parameters, and the expected stacks."""

    loss_fn: Any
    """``loss_fn(params, x, key)``."""
    params: Any
    stacks: dict[str, int]
    """The number of layers of each stack, by its path, which is that of its first layer. Empty if none is expected."""


def matrix(seed, *shape):
    """Normally distributed values for inputs of width ``shape[-2]``."""
    x = np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)
    return jnp.asarray(x, jnp.float32)


def data(i):
    """Inputs and a key."""
    x = np.random.default_rng(50 + i).normal(size=(BATCH, LENGTH, DIM))
    return jnp.asarray(x, jnp.float32), jax.random.key(i)


def block(seed):
    """The parameters of a layer."""
    return {"up": matrix(seed, DIM, 2 * DIM), "down": 0.3 * matrix(seed + 100, 2 * DIM, DIM), "scale": jnp.ones(DIM)}


def apply(p, x, activation=jax.nn.relu):
    """A residual feed-forward layer behind a norm."""
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * p["scale"]
    return x + activation(normed @ p["up"]) @ p["down"]


def model(layers, loss, stacks, **others):
    """A list of layers, an input matrix and a head."""
    params = {"layers": [block(i) for i in range(layers)], "into": matrix(200, DIM, DIM), "head": matrix(201, DIM, DIM)}
    return ListModel(loss, params | others, stacks)


def loop(activation_of):
    """The loss of a loop in which layer ``i`` has the activation ``activation_of(i)``."""

    def loss(params, x, key):
        x = x @ params["into"]
        for i, p in enumerate(params["layers"]):
            x = apply(p, x, activation_of(i))
        return error(x @ params["head"])

    return loss


def of_layer(path, n):
    """The paths of a layer's leaves, each with ``n``."""
    return {f"{path}/{name}": n for name in ("down", "scale", "up")}


def error(y):
    """A mean square."""
    return jnp.mean(jnp.square(y.astype(jnp.float32) - 1))


def plain(remat=None):
    """Layers with ``jax.checkpoint`` around each, around a part of each, around the loop, or without."""
    one = jax.checkpoint(apply) if remat == "layer" else apply
    if remat == "part":
        one = lambda p, x: x + jax.checkpoint(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])(p, x * p["scale"])

    def body(layers, x):
        for p in layers:
            x = one(p, x)
        return x

    run = jax.checkpoint(body) if remat == "loop" else body
    loss = lambda params, x, key: error(run(params["layers"], x @ params["into"]) @ params["head"])
    return model(4, loss, of_layer("layers/0", 4))


def cast():
    """The whole tree is cast before the loop."""

    def loss(params, x, key):
        params, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, x))
        x = x @ params["into"]
        for p in params["layers"]:
            x = jax.checkpoint(apply)(p, x)
        return error(x @ params["head"])

    return model(4, loss, of_layer("layers/0", 4))


def dropout(split):
    """Each layer has its key, split before the loop or folded in."""

    def loss(params, x, key):
        x, keys = x @ params["into"], jax.random.split(key, 4)
        for i, p in enumerate(params["layers"]):
            of_layer = keys[i] if split else jax.random.fold_in(key, i)
            x = jax.checkpoint(lambda p, x, key: apply(p, x) * jax.random.bernoulli(key, 0.7, x.shape))(p, x, of_layer)
        return error(x @ params["head"])

    return model(4, loss, of_layer("layers/0", 4))


def key_carried():
    """Each layer splits the key and hands it on."""

    def loss(params, x, key):
        x = x @ params["into"]
        for p in params["layers"]:
            key, own = jax.random.split(key)
            x = apply(p, x) * jax.random.bernoulli(own, 0.7, x.shape)
        return error(x @ params["head"])

    return model(4, loss, of_layer("layers/0", 4))


def scaled_by_depth():
    """Each layer has a different factor."""

    def loss(params, x, key):
        x = x @ params["into"]
        for i, p in enumerate(params["layers"]):
            x = jax.checkpoint(apply)(p, x) * (1 - 0.1 * i)
        return error(x @ params["head"])

    return model(4, loss, of_layer("layers/0", 4))


def all_outputs():
    """The loss reads each layer's output after the loop, and a penalty of each."""

    def loss(params, x, key):
        x, outputs, penalty = x @ params["into"], [], 0.0
        for p in params["layers"]:
            x = apply(p, x)
            outputs.append(x)
            penalty += jnp.mean(jnp.square(jax.nn.softmax(x)))
        return error(x @ params["head"]) + penalty + sum(error(y) * i for i, y in enumerate(outputs))

    return model(4, loss, of_layer("layers/0", 4))


def mask_and_position():
    """The mask is made once; each layer makes the table again and reads the inputs again."""

    def loss(params, x, key):
        mask = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH))) > 0, 0.0, -1e9)
        x0 = x = x @ params["into"]
        for p in params["layers"]:
            angles = jnp.arange(LENGTH)[:, None] / 10 ** (jnp.arange(DIM) / DIM)
            q = apply(p, x) * jnp.cos(angles)
            x = x + jax.nn.softmax(q @ q.swapaxes(-1, -2) + mask) @ q + 0.1 * x0
        return error(x @ params["head"])

    return model(4, loss, of_layer("layers/0", 4))


def local_and_global(layers):
    """Every third layer sees all positions, the others near ones; leftover layers stay as they are."""

    def loss(params, x, key):
        far = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
        x = x @ params["into"]
        for i, p in enumerate(params["layers"]):
            is_seen = (far >= 0) if i % 3 == 2 else (far >= 0) & (far < 2)
            q = apply(p, x, jnp.tanh if i % 3 == 2 else jax.nn.relu)
            x = x + jax.nn.softmax(jnp.where(is_seen, q @ q.swapaxes(-1, -2), -1e9)) @ q
        return error(x @ params["head"])

    stacks = {f"layers/{i}/{name}": layers // 3 for i in range(3) for name in ("down", "scale", "up")}
    return model(layers, loss, stacks)


def other_ends():
    """The first and the last layer are of another kind."""
    return model(6, loop(lambda i: jnp.sin if i in (0, 5) else jax.nn.relu), of_layer("layers/1", 4))


def interrupted():
    """A layer of another kind is in the middle."""
    loss = loop(lambda i: jnp.sin if i == 3 else jax.nn.relu)
    return model(7, loss, of_layer("layers/0", 3) | of_layer("layers/4", 3))


def encoder_and_decoder():
    """Each layer of the second list reads the output of the first list."""

    def loss(params, x, key):
        source = x @ params["into"]
        for p in params["layers"]:
            source = apply(p, source)
        x = jnp.flip(x, 1)
        for p in params["decoder"]:
            x = apply(p, x)
            x = x + jax.nn.softmax(x @ source.swapaxes(-1, -2)) @ source @ p["read"]
        return error(x @ params["head"])

    decoder = [block(10 + i) | {"read": matrix(20 + i, DIM, DIM)} for i in range(3)]
    stacks = of_layer("layers/0", 4) | of_layer("decoder/0", 3) | {"decoder/0/read": 3}
    return model(4, loss, stacks, decoder=decoder)


def adapters():
    """Frozen layers with a trained product of two narrow matrices."""

    def loss(params, x, key):
        x = x @ params["into"]
        for p, a in zip(params["layers"], params["adapters"]):
            x = apply(p, x) + x @ a["a"] @ a["b"]
        return error(x @ params["head"])

    pairs = [{"a": matrix(30 + i, DIM, 2), "b": 0.1 * matrix(40 + i, 2, DIM)} for i in range(4)]
    return model(4, loss, of_layer("layers/0", 4) | {"adapters/0/a": 4, "adapters/0/b": 4}, adapters=pairs)


def shared():
    """All layers read one matrix beside their own."""

    def loss(params, x, key):
        x = x @ params["into"]
        for p in params["layers"]:
            x = apply(p, x) + 0.1 * jnp.tanh(x @ params["shared"].T)
        return error(x @ params["head"])

    return model(4, loss, of_layer("layers/0", 4), shared=matrix(60, DIM, DIM))


def in_parts():
    """Each layer reads the rows of its own matrix, one after the other."""

    def loss(params, x, key):
        x = x @ params["into"]
        for p in params["layers"]:
            gate, shift = p["rows"]
            x = apply(p, x * gate + shift)
        return error(x @ params["head"])

    found = model(4, loss, of_layer("layers/0", 4) | {"layers/0/rows": 4})
    for i, p in enumerate(found.params["layers"]):
        p["rows"] = 1 + 0.1 * matrix(90 + i, 2, DIM)
    return found


def other_constants():
    """Each layer gets a mask: the first two the same, then others."""

    def loss(params, x, key):
        x = x @ params["into"]
        near = jnp.arange(DIM) < 3
        for p, mask in zip(params["layers"], [near, near, ~near, near]):
            x = apply(p, jnp.where(mask, x, 0.5 * x))
        return error(x @ params["head"])

    return model(4, loss, of_layer("layers/0", 4))


def side_by_side():
    """Products of one value, each with a bias: they repeat, but none reads another's output."""

    def loss(params, x, key):
        x = jnp.tile(x, 4)
        q, k, v = (x @ w + b for w, b in params["products"])
        return error((jnp.tanh(q * k) + v) @ params["head"])

    return model(0, loss, {}, products=[(matrix(i, 4 * DIM, DIM), matrix(50 + i, DIM)) for i in range(3)])


def tied():
    """The fourth layer's matrix is also the head's, so it stays by itself."""

    def loss(params, x, key):
        x = x @ params["into"]
        for p in params["layers"]:
            x = apply(p, x)
        return error(x @ params["layers"][3]["up"])

    return model(6, loss, of_layer("layers/0", 3))


def reads_the_one_before_last():
    """Each layer reads the outputs of the last two: two layers are one of the loop, and one is left over."""

    def loss(params, x, key):
        x = before = x @ params["into"]
        for p in params["layers"]:
            x, before = apply(p, x) + 0.1 * before, x
        return error(x @ params["head"])

    return model(7, loss, of_layer("layers/0", 3) | of_layer("layers/1", 3))


def other_derivative():
    """All layers compute the same with custom derivatives, one of which differs."""

    def activation_of(i):
        activation, factor = jax.custom_vjp(jnp.tanh), 3.0 if i == 3 else 1.0
        activation.defvjp(lambda x: (jnp.tanh(x), x), lambda x, d: (factor * d / jnp.cosh(x) ** 2,))
        return activation

    return model(7, loop(activation_of), of_layer("layers/0", 3) | of_layer("layers/4", 3))


def two_shapes():
    """Wide and narrow layers alternate."""
    found = model(
        6, loop(lambda i: jax.nn.relu), {f"layers/{i}/{name}": 3 for i in range(2) for name in ("down", "scale", "up")}
    )
    for i in (1, 3, 5):
        found.params["layers"][i]["up"] = matrix(70 + i, DIM, DIM)
        found.params["layers"][i]["down"] = matrix(80 + i, DIM, DIM)
    return found


MODELS = {
    **{f"plain, remat {remat}": lambda remat=remat: plain(remat) for remat in (None, "layer", "part", "loop")},
    "cast": cast,
    "keys split": lambda: dropout(True),
    "keys folded": lambda: dropout(False),
    "key carried": key_carried,
    "scaled by depth": scaled_by_depth,
    "all outputs": all_outputs,
    "mask and position": mask_and_position,
    "local and global": lambda: local_and_global(9),
    "local and global, one over": lambda: local_and_global(10),
    "other ends": other_ends,
    "interrupted": interrupted,
    "encoder and decoder": encoder_and_decoder,
    "adapters": adapters,
    "shared": shared,
    "in parts": in_parts,
    "other constants": other_constants,
    "side by side": side_by_side,
    "tied": tied,
    "the one before last": reads_the_one_before_last,
    "other derivative": other_derivative,
    "two shapes": two_shapes,
}
