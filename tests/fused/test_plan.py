"""The plan says where each parameter is updated, and why."""

import jax
import jax.numpy as jnp
import pytest
from language_model import batch, init_params, make_loss
from tiers import slow

from adalomo_jax import adalomo, fuse


def plan_of(loss_fn, params, *args):
    return fuse(loss_fn, adalomo(1e-2)).plan(params, *args)


def places(plan):
    return {leaf.path: (leaf.layers, leaf.reason) for leaf in plan.leaves}


def scan_sum(w, x=None, **options):
    x = jnp.zeros(w.shape[1:]) if x is None else x
    return jnp.sum(jax.lax.scan(lambda c, w: (c + jnp.sin(w), None), x, w, **options)[0])


STACK = jnp.ones((5, 3))
LEAF_LOSSES = {
    "scanned": (lambda p: scan_sum(p["w"]), 5, "a scan runs over its 5 layers"),
    "reversed": (lambda p: scan_sum(p["w"], reverse=True), 5, "a scan runs over its 5 layers"),
    "inside jit": (jax.jit(lambda p: scan_sum(p["w"])), 5, "a scan runs over its 5 layers"),
    "inside checkpoint": (jax.checkpoint(lambda p: scan_sum(p["w"])), 5, "a scan runs over its 5 layers"),
    "not scanned": (lambda p: jnp.sum(p["w"]), None, "no scan reads it"),
    "cast before": (
        lambda p: scan_sum(p["w"].astype(jnp.bfloat16), jnp.zeros(3, jnp.bfloat16)).astype(jnp.float32),
        5,
        "a scan runs over its 5 layers, after convert_element_type",
    ),
    "of the size of what is scanned": (lambda p: scan_sum(jnp.ones((5, 5)) @ p["w"]), None, "no scan reads it"),
    "unread": (lambda p: jnp.float32(0.0) * 2.0, None, "the loss does not read it"),
    "two scans": (lambda p: scan_sum(p["w"]) + scan_sum(p["w"]), None, "2 scans read it"),
    "also read beside": (lambda p: scan_sum(p["w"]) + jnp.max(p["w"]), None, "a scan reads it, but so does reduce_max"),
    "constant of a scan": (
        lambda p: jnp.sum(jax.lax.scan(lambda c, x: (c + jnp.sum(p["w"]) * x, None), 0.0, jnp.ones(4))[0]),
        None,
        "each iteration of a scan reads all of it",
    ),
    "initial carry": (
        lambda p: scan_sum(jnp.ones((2, 5, 3)), p["w"]),
        None,
        "each iteration of a scan reads all of it",
    ),
}


@pytest.mark.parametrize("case", LEAF_LOSSES)
def test_where_and_why(case):
    loss_fn, layers, reason = LEAF_LOSSES[case]
    assert places(plan_of(loss_fn, {"w": STACK})) == {"w": (layers, reason)}


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model(tied):
    plan = plan_of(make_loss(), init_params([4, 3], tied=tied), batch())
    found = places(plan)
    assert {path: layers for path, (layers, _) in found.items() if layers} == {
        f"layers{s}/{name}": n for s, n in enumerate([4, 3]) for name in ("scale", "mix", "up", "down")
    }
    assert {path for path, (layers, _) in found.items() if not layers} == {"embed", "norm"} | (
        set() if tied else {"head"}
    )


def test_prints_as_a_table():
    table = str(plan_of(make_loss(), init_params(4), batch())).splitlines()
    assert table[0].split() == ["parameter", "shape", "dtype", "updated", "because"]
    assert table[1].split() == ["embed", "32x16", "float32", "whole", "no", "scan", "reads", "it"]
    assert "layers0/mix" in table[4] and "scan 0, layer by layer" in table[4]
    assert table[8].startswith("gradients alive at once: ")
    assert len(table) == 1 + 7 + 1


def test_a_plan_is_a_value():
    params = init_params(4)
    assert plan_of(make_loss(), params, batch()) == plan_of(make_loss(), params, batch(1))
    assert plan_of(make_loss(), params, batch()) != plan_of(make_loss(), init_params(3), batch())


def test_planning_computes_nothing():
    shapes = jax.eval_shape(lambda: init_params(4))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    assert plan_of(make_loss(), shapes, tokens) == plan_of(make_loss(), init_params(4), batch())


@pytest.mark.parametrize("tied", [slow(False), True])
def test_gradient_bytes(tied):
    """If tied, the embedding's gradient waits for the layers. If not, the head's is gone before the layers begin."""
    params = init_params(4, dim=16, hidden=24, vocab=32, tied=tied)
    plan = plan_of(make_loss(), params, batch())
    layer = 4 * (16 + 16 * 16 + 2 * 16 * 24)
    embed, norm = 4 * 32 * 16, 4 * 16
    assert plan.gradient_bytes == (embed + layer if tied else max(layer, embed + norm))
