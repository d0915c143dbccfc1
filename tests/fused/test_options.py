"""Options that contradict each other, or the loss, are refused with the value and the way out."""

import jax
import jax.numpy as jnp
import pytest
from language_model import batch, init_params, make_loss

from adalomo_jax import adalomo, fuse
from adalomo_jax.fused.loss_scale import DynamicLossScale

NAN = float("nan")
ERRORS = {
    "a norm of 0": ({"max_grad_norm": 0.0}, "must be positive, got 0.0. None does not clip"),
    "a negative norm": ({"max_grad_norm": -1.0}, "must be positive, got -1.0. None does not clip"),
    "a norm that is no number": ({"max_grad_norm": NAN}, "must be positive, got nan. None does not clip"),
    "no microbatches": ({"microbatches": 0}, "microbatches must be a positive number of slices of the batch, got 0"),
    "half a microbatch": ({"microbatches": 0.5}, "microbatches must be a positive number .* got 0.5"),
    "another reduction": ({"reduction": "max"}, "must be 'mean' or 'sum', got 'max'"),
    "arguments without microbatches": ({"batch_argnums": 1}, "give microbatches too"),
    "parameters as the batch": ({"microbatches": 2, "batch_argnums": (0, 1)}, "0 are the parameters"),
    "a scale of 0": ({"loss_scale": 0}, "loss_scale must be positive, got 0. None does not scale"),
    "a scale that is no number": ({"loss_scale": NAN}, "loss_scale must be positive, got nan"),
    "a dynamic scale that writes all": (
        {"loss_scale": DynamicLossScale(), "skip_nonfinite": False},
        "leave skip_nonfinite at True, or give loss_scale as a number",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refuses_when_it_is_made(case):
    options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        fuse(make_loss(), adalomo(1e-2), **options)


def test_takes_what_does_not_contradict():
    fuse(make_loss(), adalomo(1e-2), max_grad_norm=1, microbatches=2, batch_argnums=1, loss_scale=DynamicLossScale())
    fuse(make_loss(), adalomo(1e-2), loss_scale=2.0, skip_nonfinite=False, reduction="sum", microbatches=1)


@pytest.mark.parametrize(
    ("argnums", "sliced"), [(None, [0, 1, 2]), (1, [0]), ((1, 3), [0, 2])], ids=["all", "one", "some"]
)
def test_which_arguments_are_sliced(argnums, sliced):
    options = fuse(make_loss(), adalomo(1e-2), microbatches=2, batch_argnums=argnums).options
    assert [p for p in range(3) if options.is_batch(p)] == sliced
    assert not any(fuse(make_loss(), adalomo(1e-2)).options.is_batch(p) for p in range(3))


def scanned(w, x, **options):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w, **options)[0]


W, X = 0.1 * jnp.ones((3, 4, 4)), jnp.ones((2, 4))
MISPLACED = {
    "two scans": (lambda p, x: jnp.sum(scanned(p["a"], scanned(p["a"], x))), "'a' (2 scans read it)"),
    "also read beside": (lambda p, x: jnp.sum(scanned(p["a"], x)) + jnp.sum(p["a"]), "a scan reads it, but so does"),
    "cut before": (
        lambda p, x: jnp.sum(scanned(p["a"][::-1], x)),
        "'a' (a scan runs over it only after rev)",
    ),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_strict_refuses_a_stack_that_has_to_be_updated_whole(case):
    loss_fn, reason = MISPLACED[case]
    params = {"a": W, "b": W}
    both = lambda p, x: loss_fn(p, x) + jnp.sum(scanned(p["b"], x))
    fuse(both, adalomo(1e-2)).init(params, X)
    step = fuse(both, adalomo(1e-2), strict=True)
    for refuses in (step.init, step.plan):
        with pytest.raises(ValueError) as error:
            refuses(params, X)
        message = str(error.value)
        assert message.startswith("strict=True") and reason in message and "'b'" not in message
        assert "leave strict out to have them updated whole" in message
    fuse(both, adalomo(1e-2), strict=True, trainable=lambda path: path == "b").init(params, X)


@pytest.mark.parametrize("tied", [False, True])
def test_strict_takes_an_ordinary_language_model(tied):
    """Embeddings, heads and norms are no layers."""
    fuse(make_loss(), adalomo(1e-2), strict=True).init(init_params([3, 2], tied=tied), batch())
