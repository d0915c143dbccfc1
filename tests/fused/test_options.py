"""Options that contradict each other, or the loss, are refused with the value and the way out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from language_model import batch, init_params, make_loss
from tiers import slow

from adalomo_jax import adalomo, fuse
from adalomo_jax.fused.loss_scale import DynamicLossScale
from adalomo_jax.fused.options import OPTIONS, Options

NAN = float("nan")
INF = float("inf")
A_FLAG = "must be True or False, got"
WRONG = {
    "has_aux": (["yes", 1, None], A_FLAG),
    "trainable": (
        ["layers", {"layers": "x"}, 1, 0.5],
        "must be a tree of bools like params, a prefix",
    ),
    "max_grad_norm": (
        [0.0, -1.0, NAN, "1", True, 1j, [1.0], jnp.ones(2)],
        "must be positive, got .* None does not",
    ),
    "microbatches": ([0, -2, 0.5, 2.0, "2", True], "must be a positive number of slices of the batch, got"),
    "reduction": (["max", None, 1, ["mean"]], "must be 'mean' or 'sum', got"),
    "batch_argnums": (
        [1.5, True, "x", -1, (1, 0.5), (0, 1), 0],
        "must be a position .*, got .* 0 is",
    ),
    "loss_scale": (
        [0, -1.0, NAN, INF, "x", True, 1j],
        "must be positive and finite, or .* None does not scale",
    ),
    "skip_nonfinite": (["no", 0, None], A_FLAG),
    "rms_metrics": (["x", 1], A_FLAG),
    "strict": (["x", None], A_FLAG),
    "stochastic_rounding": (["x", 0], "must be True, False or None, got"),
    "seed": ([1.5, -1, "x", None, True, 2**32], "must be a whole number from 0 to 2"),
    "offload": ([3, "all", ("params", 1), True], "must be 'params', 'activations', or a tuple of both, got"),
    "roll": (["x", None, 2, 0, 3.0], "must be True, False, or a whole number of layers, from 3 on, got"),
}
CASES = [(name, value) for name, (values, _) in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value!r:.20}" for name, value in CASES])
def test_refuses_a_value_out_of_its_range_in_one_line(name, value):
    with pytest.raises(ValueError, match=f"^{name} {WRONG[name][1]}") as error:
        fuse(make_loss(), adalomo(1e-2), **{"microbatches": 2, name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_each_option_has_its_range():
    assert list(OPTIONS) == list(WRONG) == [field.name for field in dataclasses.fields(Options)]


FIELDS = {
    "initial": [0.0, NAN, "x", INF],
    "growth_interval": [0, 1.5, True],
    "factor": [1.0, 0.5, None],
    "smallest": [0.0, -1.0, 2.0**16],
    "largest": [INF, 1.0],
}
FIELD_CASES = [(name, value) for name, values in FIELDS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), FIELD_CASES)
def test_refuses_a_dynamic_scale_that_cannot_work(name, value):
    with pytest.raises(ValueError, match="^loss_scale[.](initial|growth_interval|factor|smallest|largest) must be "):
        fuse(make_loss(), adalomo(1e-2), loss_scale=DynamicLossScale()._replace(**{name: value}))


NO_TRANSFORMATION = {
    "a function": (
        adalomo,
        "got the function adalomo. Call the function that makes it: fuse\\(loss_fn, adalomo\\(1e-3\\)\\)",
    ),
    "optax's": (optax.adam, "got the function adam. Call"),
    "None": (None, "got None. Call"),
    "a number": (1e-3, "got 0.001. Call"),
    "a tuple": ((1, 2), "got \\(1, 2\\). Call"),
}


@pytest.mark.parametrize("case", NO_TRANSFORMATION)
def test_refuses_what_is_no_transformation(case):
    tx, message = NO_TRANSFORMATION[case]
    with pytest.raises(ValueError, match=f"^tx must be an optax.GradientTransformation, {message}"):
        fuse(make_loss(), tx)


@pytest.mark.parametrize("loss_fn", [None, 3])
def test_refuses_a_loss_that_is_no_function(loss_fn):
    with pytest.raises(ValueError, match=f"^loss_fn must be a function: .* got {loss_fn}."):
        fuse(loss_fn, adalomo(1e-2))


ERRORS = {
    "arguments without microbatches": ({"batch_argnums": 1}, "give microbatches too"),
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
    numbers: dict[str, Any] = {"seed": np.int64(3), "microbatches": np.int32(2), "loss_scale": jnp.float32(2)}
    others: dict[str, Any] = {"strict": np.True_, "batch_argnums": [1], "trainable": {"head": True, "n": None}}
    fuse(make_loss(), adalomo(1e-2), max_grad_norm=INF, **numbers, **others)


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
    "also read beside": (lambda p, x: jnp.sum(scanned(p["a"], x)) + jnp.max(p["a"]), "a scan reads it, but so does"),
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


@pytest.mark.parametrize("tied", [slow(False), True])
def test_strict_takes_an_ordinary_language_model(tied):
    """Embeddings, heads and norms are not layers."""
    fuse(make_loss(), adalomo(1e-2), strict=True).init(init_params([3, 2], tied=tied), batch())
