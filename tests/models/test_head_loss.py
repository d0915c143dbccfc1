"""The loss in tiles of the vocabulary has the value and the gradient of plain differentiation, computed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow

from adalomo_jax.models.head_loss import Head, head_loss, tile_width

B, T, D = 2, 7, 16
VOCABULARIES = (32000, 32768, 49152, 49155, 50257, 100352, 128256, 151936, 200064, 256000, 262144, 262208)


def inputs(vocabulary, axes, dtype=jnp.float32):
    random = np.random.default_rng(0)
    head = random.normal(0, 0.5, (D, vocabulary) if axes == "dv" else (vocabulary, D))
    targets = jnp.asarray(random.integers(0, vocabulary, (B, T)))
    weights = jnp.asarray(random.integers(0, 2, (B, T)).astype(np.float32))
    return jnp.asarray(random.normal(0, 1, (B, T, D)), dtype), jnp.asarray(head, dtype), targets, weights


def expected(x, head, targets, weights, how):
    """The loss and both gradients, by the equations."""
    x, head = (np.asarray(a, np.float64) for a in (x, head))
    head = head if how.axes == "dv" else head.T
    products = x @ head / how.divisor
    logits = products if how.softcap is None else how.softcap * np.tanh(products / how.softcap)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    is_target = np.eye(head.shape[1])[np.asarray(targets)]
    loss = -(np.log((p * is_target).sum(-1)) * weights).sum()
    d = (p - is_target) * np.asarray(weights)[..., None] / how.divisor
    d = d if how.softcap is None else d * (1 - (logits / how.softcap) ** 2)
    d_head = np.einsum("btd,btv->dv", x, d)
    return loss, d @ head.T, d_head if how.axes == "dv" else d_head.T


@pytest.mark.parametrize("axes", ["dv", "vd"])
@pytest.mark.parametrize("options", [{}, {"divisor": 3.0, "softcap": 2.0}], ids=["plain", "divided and capped"])
@pytest.mark.parametrize("vocabulary", [100, 512, 700], ids=["one tile", "whole tiles", "a tile that overlaps"])
def test_value_and_gradients_are_those_of_the_equations(vocabulary, options, axes):
    how = Head(axes, **options, width=128)
    x, head, targets, weights = inputs(vocabulary, axes)
    twice = lambda x, head: jnp.multiply(2, head_loss(x, head, targets, weights, how))
    loss, gradients = jax.jit(jax.value_and_grad(twice, argnums=(0, 1)))(x, head)
    of_equations = expected(x, head, targets, weights, how)
    for ours, theirs in zip((loss, *gradients), of_equations, strict=True):
        np.testing.assert_allclose(ours, 2 * theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [slow(512), 700])
def test_the_gradient_of_a_bfloat16_head_is_rounded_once(vocabulary):
    """Tiles change none of its bits, whatever their width. A sum over parts of the tokens would round each time."""
    x, head, targets, weights = inputs(vocabulary, "dv", jnp.bfloat16)
    gradient = lambda width: jax.grad(head_loss, argnums=1)(x, head, targets, weights, Head("dv", width=width))
    assert np.array_equal(gradient(128), gradient(None))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("parts", [2, 8, 16, 32])
def test_tiles_compute_less_than_one_percent_twice(vocabulary, parts):
    most = -(-vocabulary // parts)
    width = tile_width(vocabulary, most)
    assert width <= most and most / width < 2
    assert -(-vocabulary // width) * width < 1.01 * vocabulary


@pytest.mark.uncached
def test_no_sum_of_the_heads_gradient_is_in_memory():
    """The compiled loop writes tiles of the gradient, and adds nothing of its size."""
    vocabulary = 1024
    args = inputs(vocabulary, "dv")
    gradient = jax.jit(jax.grad(lambda *args: head_loss(*args, Head("dv", width=128)), argnums=1))
    text = gradient.lower(*args).compile().as_text() or ""
    made = [line for line in text.splitlines() if f"= f32[{D},{vocabulary}]" in line]
    assert made and not any(" add(" in line for line in made)
