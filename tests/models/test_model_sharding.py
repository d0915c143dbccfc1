"""A Llama on a mesh is cut along the right axes and computes the same."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiers import slow

from adalomo_jax.models import PRESETS, Decoder, batch_sharding, make_mesh, next_token_loss, param_shardings

CONFIG = dataclasses.replace(PRESETS["tiny"], num_key_value_heads=4)


def make(**options):
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), **options)))
    random = np.random.default_rng(0)
    draw = lambda path, w: np.asarray(random.normal(path[-1].key == "weight", 0.05, w.shape), w.dtype)  # norms around 1
    return graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(abstract))


def loss_and_gradients(graphdef, params, tokens):
    return jax.jit(jax.value_and_grad(lambda p: next_token_loss(nnx.merge(graphdef, p), tokens)))(params)


def test_axes_that_are_cut():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    specs = jax.tree.map(lambda s: tuple(s.spec), param_shardings(make()[1], mesh))
    assert specs["embed_tokens"]["embedding"] == ("tensor", "fsdp")
    assert specs["lm_head"]["kernel"] == ("fsdp", "tensor")
    assert specs["norm"]["weight"] == ()
    block = specs["layers"]
    assert block["self_attn"]["q_proj"]["kernel"] == (None, "fsdp", "tensor")
    assert block["self_attn"]["o_proj"]["kernel"] == (None, "tensor", "fsdp")
    assert block["mlp"]["down_proj"]["kernel"] == (None, "tensor", "fsdp")
    assert block["input_layernorm"]["weight"] == ()


def test_what_the_mesh_does_not_divide_is_not_cut():
    mesh = make_mesh({"tensor": 8})
    params = {"lm_head": {"kernel": jax.ShapeDtypeStruct((6, 12), "float32")}}
    assert tuple(param_shardings(params, mesh)["lm_head"]["kernel"].spec) == ("fsdp", None)


FURTHER = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}]


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 4, "tensor": 2}, *map(slow, FURTHER)],
)
def test_loss_and_gradients_are_those_of_one_device(sizes):
    mesh = make_mesh(sizes)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 16))
    expected = loss_and_gradients(*make(), tokens)
    graphdef, params = make(batch_sharding=batch_sharding(mesh))
    params = jax.device_put(params, param_shardings(params, mesh))
    actual = loss_and_gradients(graphdef, params, jax.device_put(tokens, batch_sharding(mesh)))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), actual, expected)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"fsdp": 3}, "takes 3 devices, but there are 8"),
        ({"model": 8}, "axes data, fsdp, tensor"),
        ({"data": 0}, "at least 1"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        make_mesh(sizes)
