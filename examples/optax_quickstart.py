"""Fits a small network, with layers stacked for a scan, with AdaLomo as an ordinary Optax optimizer.

    python examples/optax_quickstart.py

Nothing here is fused: the step computes all gradients, then calls `tx.update`, as with any Optax optimizer.
`layer_axes` says that each layer of the stack is a tensor of its own.
"""

import jax
import jax.numpy as jnp
import optax

from adalomo_jax import adalomo

LAYERS, WIDTH, STEPS = 4, 32, 300


def init(key):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(k1, (1, WIDTH)),
        "layers": jax.random.normal(k2, (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5,
        "out": jax.random.normal(k3, (WIDTH, 1)) / WIDTH,
    }


def predict(params, x):
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x @ params["in"], params["layers"])
    return h @ params["out"]


def loss_fn(params, x, y):
    return jnp.mean((predict(params, x) - y) ** 2)


def main():
    x = jnp.linspace(-1.0, 1.0, 256)[:, None]
    y = jnp.sin(4 * x)
    params = init(jax.random.key(0))
    tx = adalomo(
        optax.cosine_decay_schedule(1e-2, STEPS),
        weight_decay=0.01,
        layer_axes={"in": None, "layers": 0, "out": None},
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
        if i % 50 == 0 or i == STEPS - 1:
            print(f"step {i:>3}  loss {loss:.5f}")
    weights, kept = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, state))
    print(f"weights {weights} bytes, optimizer state {kept} bytes")
    assert losses[-1] < losses[0] / 20


if __name__ == "__main__":
    main()
