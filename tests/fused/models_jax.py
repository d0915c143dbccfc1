"""Models in plain JAX, as users write them, with various scans, scanned inputs and code around the scans."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from found_model import Model, Sizes, error, inputs
from jax import lax


def matrix(seed, *shape):
    """A normal matrix for inputs of width ``shape[-2]``, made by NumPy: JAX would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[-2])))


def feed_forward_stack(sizes: Sizes, seed: int = 0):
    return {
        "scale": jnp.asarray(np.ones((sizes.layers, sizes.dim), np.float32)),
        "up": matrix((seed, 0), sizes.layers, sizes.dim, sizes.hidden),
        "down": matrix((seed, 1), sizes.layers, sizes.hidden, sizes.dim),
    }


def attention_stack(sizes: Sizes, seed: int = 0):
    return {name: matrix((10 + seed, i), sizes.layers, sizes.dim, sizes.dim) for i, name in enumerate("qkvo")}


def normalize(x, scale=1.0):
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale


def feed_forward(x, w):
    return x + jax.nn.silu(normalize(x, w["scale"]) @ w["up"]) @ w["down"]


def attend(x, source, w):
    q, k, v = normalize(x) @ w["q"], source @ w["k"], source @ w["v"]
    return x + jax.nn.softmax(q @ k.mT / q.shape[-1] ** 0.5) @ v @ w["o"]


@jax.checkpoint
def layer(x, w):
    return feed_forward(x, w), None


def readout(params, y, x):
    return error(normalize(y) @ params["head"], x)


def model(sizes: Sizes, loss_fn, layered=("layers",), **params) -> Model:
    """A model with one stack, a head and ``params``; the paths in ``layered`` are updated layer by layer."""
    params = {
        "layers": feed_forward_stack(sizes),
        "head": matrix(1, sizes.dim, sizes.dim),
        **params,
    }
    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {path: sizes.layers for path in layered})


def encoder_decoder(sizes: Sizes) -> Model:
    """Each layer of the decoder attends to the encoder's output, a constant of the decoder's scan."""

    @jax.checkpoint
    def encode(x, w):
        x = attend(x, normalize(x), w)
        return feed_forward(x, w), None

    def loss_fn(params, source, x):
        memory = normalize(lax.scan(encode, source, params["encoder"])[0], params["memory_scale"])

        @jax.checkpoint
        def decode(y, w):
            return feed_forward(attend(y, memory, w), w), None

        return readout(params, lax.scan(decode, x, params["decoder"])[0], x)

    stacks = [feed_forward_stack(sizes, seed) | attention_stack(sizes, seed) for seed in (0, 1)]
    head = matrix(1, sizes.dim, sizes.dim)
    params = {"encoder": stacks[0], "decoder": stacks[1], "memory_scale": jnp.ones(sizes.dim), "head": head}
    batch = lambda i: (inputs(sizes, 50 + i), inputs(sizes, i))
    return Model(loss_fn, params, batch, {"encoder": sizes.layers, "decoder": sizes.layers})


def read_by_two_scans(sizes: Sizes) -> Model:
    """Two scans read the same layers."""

    def loss_fn(params, x):
        y, _ = lax.scan(layer, x, params["layers"])
        y, _ = lax.scan(layer, normalize(y) @ params["between"], params["layers"])
        return readout(params, y, x)

    return model(sizes, loss_fn, layered=(), between=jnp.eye(sizes.dim))


def shared_layer(sizes: Sizes) -> Model:
    """As in ALBERT, one layer is applied again and again."""

    def loss_fn(params, x):
        return readout(params, lax.scan(lambda y, _: layer(y, params["layer"]), x, None, length=sizes.layers)[0], x)

    one = jax.tree.map(lambda w: w[0], feed_forward_stack(sizes))
    params = {"layer": one, "head": matrix(1, sizes.dim, sizes.dim)}
    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {})


def plain(sizes: Sizes, **options) -> Model:
    """A scan with options of `lax.scan`."""
    return model(sizes, lambda params, x: readout(params, lax.scan(layer, x, params["layers"], **options)[0], x))


def gated_and_fed(sizes: Sizes) -> Model:
    """The scan also runs over gates from a softmax, and over inputs of each layer that depend on another leaf."""

    @jax.checkpoint
    def body(y, w_gate_fed):
        w, gate, fed = w_gate_fed
        return y + gate * (feed_forward(y, w) - y) + fed, None

    def loss_fn(params, x):
        fed = jnp.einsum("btd,ld->lbtd", x, params["feed"])
        return readout(params, lax.scan(body, x, (params["layers"], jax.nn.softmax(params["gates"]), fed))[0], x)

    gates = jnp.linspace(0.0, 1.0, sizes.layers)
    return model(sizes, loss_fn, gates=gates, feed=0.1 * matrix(2, sizes.layers, sizes.dim))


def every_layer_in_the_loss(sizes: Sizes) -> Model:
    """Deep supervision: the loss reads the output of each layer."""

    def loss_fn(params, x):
        ys = lax.scan(lambda y, w: (layer(y, w)[0],) * 2, x, params["layers"])[1]
        return jnp.mean(jax.vmap(lambda y: readout(params, y, x))(ys))

    return model(sizes, loss_fn)


def branches_and_loops(sizes: Sizes) -> Model:
    """Beside the scan: a branch that depends on the batch, a loop of fixed length, and a loop without gradients."""

    def loss_fn(params, x):
        y = lax.cond(jnp.mean(x) > 0, lambda x: x @ params["into"], lambda x: jnp.tanh(x @ params["into"]), x)
        y, _ = lax.scan(layer, y, params["layers"])
        y = lax.fori_loop(0, 3, lambda _, y: y + 0.1 * jnp.tanh(y @ params["refine"]), y)
        fixed = lax.stop_gradient(params["head"])
        grow = lambda v: fixed @ v * 1.5
        largest = lax.while_loop(lambda v: jnp.linalg.norm(v) < 100.0, grow, jnp.ones(sizes.dim))
        return readout(params, y + jnp.tanh(largest), x)

    square = jnp.eye(sizes.dim) + 0.1 * matrix(2, sizes.dim, sizes.dim)
    return model(sizes, loss_fn, into=square, refine=square.T)


MODELS = {
    "encoder-decoder": encoder_decoder,
    "read by two scans": read_by_two_scans,
    "shared layer": shared_layer,
    "reversed": partial(plain, reverse=True),
    "unroll=2": partial(plain, unroll=2),
    "other scanned inputs": gated_and_fed,
    "every layer in the loss": every_layer_in_the_loss,
    "branches and loops": branches_and_loops,
}
