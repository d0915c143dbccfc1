"""Models in plain JAX, Haiku and Equinox, as users write them, with various kinds of layers and parameters."""

from functools import partial

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from found_model import Model, Sizes, error, inputs
from jax import lax
from models_jax import attention_stack, feed_forward, feed_forward_stack, layer, matrix, model, normalize, readout


def convolutions(sizes: Sizes) -> Model:
    """Kernels of shape ``[layers, height, width, in, out]``."""

    @jax.checkpoint
    def body(y, w):
        h = lax.conv_general_dilated(y, w["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + jax.nn.gelu(h + w["bias"]), None

    def loss_fn(params, images):
        return readout(params, lax.scan(body, images, params["layers"])[0], images)

    kernel = matrix(0, sizes.layers, 3, 3, sizes.dim, sizes.dim) / 3
    params = {
        "layers": {"kernel": kernel, "bias": jnp.zeros((sizes.layers, sizes.dim))},
        "head": matrix(1, sizes.dim, sizes.dim),
    }
    batch = lambda i: (jnp.stack([inputs(sizes, i), inputs(sizes, 50 + i)], axis=1),)
    return Model(loss_fn, params, batch, {"layers": sizes.layers})


def experts(sizes: Sizes, top_1: bool) -> Model:
    """Each layer has four experts (``[layers, experts, in, out]``), and mixes them or picks one for each token."""

    @jax.checkpoint
    def body(y, w):
        h = normalize(y)
        gates = jax.nn.softmax(h @ w["router"])
        if top_1:
            gates *= jax.nn.one_hot(jnp.argmax(gates, axis=-1), 4)
        h = jax.nn.silu(jnp.einsum("btd,edh->bteh", h, w["up"]))
        return y + jnp.einsum("bteh,ehd,bte->btd", h, w["down"], gates), None

    stack = {
        "router": matrix(10, sizes.layers, sizes.dim, 4),
        "up": matrix(11, sizes.layers, 4, sizes.dim, sizes.hidden),
        "down": matrix(12, sizes.layers, 4, sizes.hidden, sizes.dim),
    }
    loss_fn = lambda params, x: readout(params, lax.scan(body, x, params["layers"])[0], x)
    return model(sizes, loss_fn, layers=stack)


@jax.custom_vjp
def attention(q, k, v):
    return _attention_forward(q, k, v)[0]


def _attention_forward(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    log_sums = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    out = jnp.exp(scores - log_sums) @ v
    return out, (q, k, v, out, log_sums)


def _attention_backward(saved, d_out):
    """Recomputes the probabilities, as kernels do, from the log-sum that the forward pass saved for each row."""
    q, k, v, out, log_sums = saved
    scale = q.shape[-1] ** -0.5
    p = jnp.exp(q @ k.mT * scale - log_sums)
    d_scores = p * (d_out @ v.mT - jnp.sum(d_out * out, axis=-1, keepdims=True)) * scale
    return d_scores @ k, d_scores.mT @ q, p.mT @ d_out


attention.defvjp(_attention_forward, _attention_backward)


@jax.custom_jvp
def squareplus(x):
    return (x + jnp.sqrt(x * x + 4)) / 2


squareplus.defjvps(lambda d_x, y, x: d_x * y / jnp.sqrt(x * x + 4))


def handwritten_derivatives(sizes: Sizes) -> Model:
    """The layer calls a function with its own backward pass, and one with its own derivative."""

    @jax.checkpoint
    def body(y, w):
        h = normalize(y)
        y = y + attention(h @ w["q"], h @ w["k"], h @ w["v"]) @ w["o"]
        return y + squareplus(normalize(y, w["scale"]) @ w["up"]) @ w["down"], None

    loss_fn = lambda params, x: readout(params, lax.scan(body, x, params["layers"])[0], x)
    return model(sizes, loss_fn, layers=feed_forward_stack(sizes) | attention_stack(sizes))


def scalars_and_empty(sizes: Sizes) -> Model:
    """Each layer has a scalar and a leaf of size 0, and so has the rest of the model."""

    @jax.checkpoint
    def body(y, w):
        return y + w["gate"] * (feed_forward(y, w) - y) + jnp.sum(w["adapters"]), None

    def loss_fn(params, x):
        y = normalize(lax.scan(body, x, params["layers"])[0] + jnp.sum(params["prefix"]))
        return error(params["temperature"] * y @ params["head"], x)

    extra = {"gate": jnp.linspace(0.5, 1.0, sizes.layers), "adapters": jnp.zeros((sizes.layers, 0))}
    stack = feed_forward_stack(sizes) | extra
    return model(sizes, loss_fn, layers=stack, temperature=jnp.float32(1.5), prefix=jnp.zeros((0, sizes.dim)))


def integers_and_bools(sizes: Sizes) -> Model:
    """Some leaves have no gradient: a table of positions, a count, and flags for the layers that are on."""

    @jax.checkpoint
    def body(y, w):
        return jnp.where(w["on"], layer(y[:, w["order"]], w)[0], y), None

    def loss_fn(params, x):
        y, _ = lax.scan(body, x + params["offset"][params["positions"]] / params["count"], params["layers"])
        return readout(params, y, x)

    order = jnp.stack([jnp.roll(jnp.arange(sizes.length), i) for i in range(sizes.layers)])
    stack = feed_forward_stack(sizes) | {"on": jnp.arange(sizes.layers) != 1, "order": order}
    stack_names = [f"layers/{name}" for name in ("scale", "up", "down")]
    return model(
        sizes,
        loss_fn,
        layered=stack_names,
        layers=stack,
        offset=0.1 * matrix(2, sizes.length, sizes.dim),
        positions=jnp.arange(sizes.length)[::-1],
        count=jnp.int32(2),
    )


def haiku(sizes: Sizes) -> Model:
    """Uses `hk.layer_stack`."""

    class Block(hk.Module):
        def __call__(self, x):
            h = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)
            return x + hk.Linear(x.shape[-1])(jax.nn.gelu(hk.Linear(sizes.hidden)(h)))

    @hk.transform
    def net(x):
        y = hk.layer_stack(sizes.layers, name="layers")(hk.remat(lambda x: Block(name="block")(x)))(x)
        return hk.Linear(sizes.dim, name="head")(y)

    apply = hk.without_apply_rng(net).apply
    params = jax.jit(net.init)(jax.random.key(0), inputs(sizes, 0))
    layered = {module: sizes.layers for module in params if "block" in module}
    return Model(lambda params, x: error(apply(params, x), x), params, lambda i: (inputs(sizes, i),), layered)


class EquinoxBlock(eqx.Module):
    """A residual layer for one token."""

    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, sizes: Sizes, key: jax.Array):
        self.norm = eqx.nn.LayerNorm(sizes.dim)
        self.mlp = eqx.nn.MLP(sizes.dim, sizes.dim, sizes.hidden, depth=1, activation=jax.nn.gelu, key=key)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class EquinoxNet(eqx.Module):
    """Layers stacked by `eqx.filter_vmap`, and a head."""

    blocks: EquinoxBlock
    head: eqx.nn.Linear

    def __init__(self, sizes: Sizes, key: jax.Array):
        keys, head_key = jax.random.split(key, sizes.layers), jax.random.fold_in(key, 1)
        self.blocks = eqx.filter_vmap(partial(EquinoxBlock, sizes))(keys)
        self.head = eqx.nn.Linear(sizes.dim, sizes.dim, key=head_key)

    def __call__(self, x):
        dynamic, static = eqx.partition(self.blocks, eqx.is_array)
        body = jax.checkpoint(lambda x, block: (eqx.combine(block, static)(x), None))
        return self.head(lax.scan(body, x, dynamic)[0])


def equinox(sizes: Sizes) -> Model:
    """The inexact arrays are trained; the loss closes over the rest, and maps the model over the batch."""
    params, static = eqx.partition(EquinoxNet(sizes, jax.random.key(0)), eqx.is_inexact_array)

    def loss_fn(params, x):
        net = eqx.combine(params, static)
        return error(jax.vmap(jax.vmap(net))(x), x)

    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {"blocks": sizes.layers})


MODELS = {
    "convolutions": convolutions,
    "experts mixed": partial(experts, top_1=False),
    "experts top 1": partial(experts, top_1=True),
    "handwritten derivatives": handwritten_derivatives,
    "scalars and empty": scalars_and_empty,
    "integers and bools": integers_and_bools,
    "haiku": haiku,
    "equinox": equinox,
}
