"""A mixture of experts is the sum that its docstring gives, and computes little besides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow

from adalomo_jax.models.experts import Experts, _Rows, choose, mixture
from adalomo_jax.models.mixture import Balance, balancing_loss

N, D, F, E, K = 40, 8, 12, 6, 3


def arrays(dtype="float32"):
    random = np.random.default_rng(0)
    of = lambda *shape: jnp.asarray(random.normal(0, 0.5, shape), dtype)
    return of(N, D), of(N, E), Experts(of(E, D, F), of(E, D, F), of(E, F, D))


def choices(kind, logits_NE):
    """Which experts, and how much of each: as a router chooses, or all tokens the same ones."""
    expert_NK, weight_NK, _ = choose(logits_NE, K, normalized=True)
    return {"as routed": expert_NK, "the same": jnp.broadcast_to(jnp.array([4, 1, 5]), (N, K))}[kind], weight_NK


def dense(x_ND, expert_NK, weight_NK, experts):
    """Each token by each expert, of which those that were not chosen have no weight."""
    weight_NE = jnp.zeros((N, E)).at[jnp.arange(N)[:, None], expert_NK].add(weight_NK)
    gate_NEF, up_NEF = (jnp.einsum("nd,edf->nef", x_ND, w) for w in experts[:2])
    return jnp.einsum("ne,nef,efd->nd", weight_NE, jax.nn.silu(gate_NEF) * up_NEF, experts.down_EFD)


@pytest.mark.parametrize("kind", ["as routed", "the same"])
def test_value_and_gradients_are_those_of_all_tokens_through_all_experts(kind):
    x_ND, logits_NE, experts = arrays()
    expert_NK, weight_NK = choices(kind, logits_NE)

    def both(mix):
        loss = lambda x, weight, experts: jnp.sum(jnp.sin(mix(x, expert_NK, weight, experts)))
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x_ND, weight_NK, experts)

    found, expected = both(lambda *args: mixture(*args, jax.nn.silu)), both(dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    moved = jnp.abs(found[1][2].gate_EDF).max((1, 2)) > 0
    assert moved.tolist() == ([True] * E if kind == "as routed" else [False, True, False, False, True, True])


def test_an_experts_gradient_is_rounded_once():
    """Over all of its tiles it is added up in float32."""
    x_ND, logits_NE, experts = arrays("bfloat16")
    x_ND = jnp.tile(x_ND, (64, 1))
    expert_NK, weight_NK = jnp.zeros((len(x_ND), 1), jnp.int32), jnp.ones((len(x_ND), 1))
    gradient = lambda experts: jax.grad(
        lambda experts: jnp.sum(mixture(x_ND.astype(experts.up_EDF.dtype), expert_NK, weight_NK, experts, lambda x: x))
    )(experts)
    exact = gradient(jax.tree.map(lambda w: w.astype(jnp.float32), experts)).down_EFD[0]
    found = gradient(experts).down_EFD[0].astype(jnp.float32)
    assert jnp.abs(found - exact).max() < 2**-8 * jnp.abs(exact).max()


@pytest.mark.parametrize(("experts", "most"), [slow(128, 8), slow(8, 2), (60, 4)])
def test_few_rows_are_computed_in_vain(experts, most):
    logits_NE = jnp.asarray(np.random.default_rng(0).normal(size=(2048, experts)), jnp.float32)
    expert_NK, weight_NK, _ = choose(logits_NE, most, normalized=True)
    none = Experts(*(jnp.zeros((experts, 1, 1)) for _ in range(3)))
    rows = _Rows.of(expert_NK, weight_NK, none)
    computed = int(jnp.sum(rows.tiles(rows.count_E))) * rows.size
    assert int(rows.count_E.sum()) == 2048 * most
    assert computed <= 1.4 * 2048 * most


def test_weights_are_probabilities_or_their_shares():
    logits_NE = arrays()[1]
    expert_NK, weight_NK, probability_NE = choose(logits_NE, K, normalized=False)
    expected = np.exp(np.float64(logits_NE)) / np.exp(np.float64(logits_NE)).sum(1, keepdims=True)
    np.testing.assert_allclose(probability_NE, expected, rtol=1e-5)
    np.testing.assert_allclose(weight_NK, np.sort(expected)[:, : -K - 1 : -1], rtol=1e-5)
    assert expert_NK[:, 0].tolist() == np.argmax(expected, 1).tolist()
    np.testing.assert_allclose(choose(logits_NE, K, normalized=True)[1].sum(1), 1, rtol=1e-5)


def test_experts_in_balance_have_the_least_loss():
    of = lambda counts: jnp.asarray([counts], jnp.float32)
    even = Balance(of([4, 4, 4, 4]), of([2, 2, 2, 2]), jnp.array([8.0]))
    uneven = Balance(of([8, 8, 0, 0]), of([4, 4, 0, 0]), jnp.array([8.0]))
    assert float(balancing_loss(even)) == 2.0
    assert float(balancing_loss(uneven)) == 4.0
    both = jax.tree.map(lambda *x: jnp.concatenate(x), uneven, Balance(*(x[..., ::-1] for x in uneven)))
    assert float(balancing_loss(both)) == 2.0  # layers count together, as in transformers
