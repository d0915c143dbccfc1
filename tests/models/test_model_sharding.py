"""A Llama on a mesh is cut along the right axes and computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import FAMILIES, VARIANTS
from tiers import slow

from adalomo_jax.models import PRESETS, Decoder, batch_sharding, make_mesh, next_token_loss, param_shardings
from adalomo_jax.pretrained.names import param_shapes

CONFIG = dataclasses.replace(PRESETS["tiny"], num_key_value_heads=4, vocab_size=1024)
CONFIGS = {"tiny": CONFIG} | FAMILIES
BOTH = {"fsdp": 4, "tensor": 2}


def make(config=CONFIG, **options):
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options)))
    random = np.random.default_rng(0)
    draw = lambda path, w: np.asarray(random.normal(path[-1].key == "weight", 0.05, w.shape), w.dtype)  # norms around 1
    return graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(abstract))


def loss_and_gradients(graphdef, params, tokens):
    loss = lambda p: next_token_loss(nnx.merge(graphdef, p), tokens, chunk_size=4, router_loss=0.1)
    return jax.jit(jax.value_and_grad(loss))(params)


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


@pytest.mark.slow
def test_matrices_of_all_families_are_cut_and_layer_axes_are_not():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    for name, config in (FAMILIES | VARIANTS).items():
        shardings = param_shardings(param_shapes(dataclasses.replace(config, num_hidden_layers=8)), mesh)
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
            place, spec = jax.tree_util.keystr(path, simple=True, separator="/"), tuple(sharding.spec)
            assert not place.startswith("layers/") or spec[:1] in ((None,), ()), (name, place, spec)
            if place.endswith(("kernel", "embedding")) and "/gate/" not in place:  # a router is small, and whole
                assert set(spec) - {None} == {"fsdp", "tensor"}, (name, place, spec)
    biases = param_shardings(param_shapes(VARIANTS["llama, biases"]), mesh)["layers"]
    assert tuple(biases["self_attn"]["q_proj"]["bias"].spec) == (None, "tensor")
    assert tuple(biases["mlp"]["down_proj"]["bias"].spec) == (None, None)


def test_what_the_mesh_does_not_divide_is_not_cut():
    mesh = make_mesh({"tensor": 8})
    params = {"lm_head": {"kernel": jax.ShapeDtypeStruct((6, 12), "float32")}}
    assert tuple(param_shardings(params, mesh)["lm_head"]["kernel"].spec) == ("fsdp", None)


FURTHER = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(("tiny", BOTH), *(slow("tiny", sizes) for sizes in FURTHER)),
        *(slow("gemma-3", BOTH), slow("qwen3-moe", BOTH), slow("qwen3-moe", {"data": 2, "fsdp": 4})),
        *(slow(name, BOTH) for name in ("gemma-2", "phi-4-mini", "olmo-2", "qwen3", "qwen2", "mixtral")),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(name, sizes):
    """Of the small vocabulary each device has one tile, of the other several."""
    mesh, config = make_mesh(sizes), CONFIGS[name]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 16))
    expected = loss_and_gradients(*make(config), tokens)
    graphdef, params = make(config, batch_sharding=batch_sharding(mesh))
    params = jax.device_put(params, param_shardings(params, mesh))
    actual = loss_and_gradients(graphdef, params, jax.device_put(tokens, batch_sharding(mesh)))
    # Another attention kernel on one device differs by up to 1e-5 of the largest entry, with Gemma 3.
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - e).max() <= 5e-5 * np.abs(e).max()


@pytest.mark.parametrize("name", [slow("tiny"), slow("gemma-3"), "qwen3-moe"])
def test_bfloat16_has_no_sum_at_which_the_compiler_aborts(name):
    """As XLA's does for CPUs if a ``shard_map`` runs over some axes of a mesh only."""
    mesh, config = make_mesh(BOTH), CONFIGS[name]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 16))
    expected, _ = loss_and_gradients(*make(config), tokens)
    graphdef, params = make(config, batch_sharding=batch_sharding(mesh), dtype=jnp.bfloat16)
    params = jax.device_put(params, param_shardings(params, mesh))
    loss, gradients = loss_and_gradients(graphdef, params, jax.device_put(tokens, batch_sharding(mesh)))
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(gradients))
    np.testing.assert_allclose(loss, expected, rtol=1e-2)


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
