"""Runs of finetune whose weights are kept in int8 or 24 bits: they resume to the same bits, and write floats."""

import dataclasses
import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_program import refused
from safetensors.numpy import load_file
from tiers import slow

from adalomo_jax import Float24, Int8, floats
from adalomo_jax.cli import main
from adalomo_jax.models import PRESETS, decoder_of, generate
from adalomo_jax.models.weights import kept, make_kept
from adalomo_jax.optimizers.kept import is_kept
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.pretrained.names import param_shapes
from adalomo_jax.training.checkpoints.save import restore_params

FORMS = {"int8": Int8, "bf16+8": Float24}


pytestmark = pytest.mark.usefixtures("small")


def command(corpus, folder, weights, *others):
    options = ["--batch-size", "8", "--seq-len", "16", "--steps", "6", "--weights", weights]
    return ["finetune", "--data", str(corpus), *options, "--output", str(folder), *others]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The folder of a run, by the form of its weights."""
    made = {}

    def folder(weights):
        if weights not in made:
            made[weights] = tmp_path_factory.mktemp("runs") / weights
            main(command(corpus, made[weights], weights))
        return made[weights]

    return folder


def numbered(tree):
    """The tree with the number of each leaf in its place."""
    return jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "bf16+8"])
def test_a_run_resumes_to_the_same_bits_and_writes_floats(weights, finished, corpus, tmp_path):
    folder, again = finished(weights), tmp_path / "again"
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["eval_loss"] for row in losses if "eval_loss" in row]
    assert evaluated[-1] < evaluated[0]
    shutil.copytree(folder, again)
    for path in (again / "model.safetensors", again / "summary.json", again / "checkpoints" / "6"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    main(command(corpus, again, weights, "--resume"))
    written = [load_file(path / "model.safetensors") for path in (folder, again)]
    chex.assert_trees_all_equal(*written)
    assert {x.dtype for x in written[0].values()} == {np.dtype(np.float32)}
    params, config = restore_params(folder / "checkpoints" / "6")
    up = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(up, FORMS[weights]) and config == PRESETS["tiny"]
    exported = load_params(config, open_checkpoint(folder).source, "float32")
    chex.assert_trees_all_equal(floats(params), exported)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights"] == weights
    assert summary["params_bytes"] == sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.parametrize("weights", ["int8", "bf16+8"])
def test_a_preset_is_made_leaf_by_leaf(weights):
    """The same weights as those of all leaves at once, and meanwhile the floats of one leaf alone."""
    shapes = param_shapes(PRESETS["tiny"])
    make = lambda: jax.tree.map(lambda i, x: jax.random.normal(jax.random.key(i), x.shape), numbered(shapes), shapes)
    chex.assert_trees_all_equal(make_kept(make, weights), kept(jax.jit(make)(), weights))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "bf16+8"])
def test_a_checkpoint_is_encoded_as_it_is_loaded(weights, finished):
    source = open_checkpoint(finished("int8")).source
    of_floats = load_params(PRESETS["tiny"], source, "float32")
    loaded = load_params(PRESETS["tiny"], source, "float32", weights=weights)
    encoded = jax.tree.leaves(loaded, is_leaf=is_kept)
    assert sum(isinstance(x, FORMS[weights]) for x in encoded) == 7
    largest = jax.tree.map(lambda x: float(jnp.max(jnp.abs(x))), of_floats)
    for a, b, most in zip(*map(jax.tree.leaves, (floats(loaded), of_floats, largest)), strict=True):
        assert float(jnp.max(jnp.abs(a - b))) <= most / (230 if weights == "int8" else 2**16)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "bf16+8"])
def test_a_checkpoint_continues_a_prompt_as_the_floats_that_the_run_wrote(weights, finished, capsys):
    folder, said = finished(weights), []
    capsys.readouterr()
    for model in (folder, folder / "checkpoints" / "6"):
        main(["generate", "--model", str(model), "--prompt", "def ", "--length", "12", "--temperature", "0"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > len("def ")


@pytest.mark.uncached
@pytest.mark.parametrize("weights", ["int8", slow("bf16+8")])
def test_a_model_that_reads_and_generates_decodes_one_layer_at_a_time(weights):
    config = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=16)
    shapes = kept(param_shapes(config, "float32"), weights)
    layers = jax.tree.leaves(shapes["layers"], is_leaf=is_kept)
    stacks = sum(math.prod(x.shape) * 4 for x in layers if is_kept(x))
    tokens, key = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.random.key(0)
    for run in (
        lambda params, tokens: decoder_of(config, params)(tokens),
        lambda params, tokens: generate(decoder_of(config, params), tokens, 4, key=key),
    ):
        sizes = jax.jit(run).lower(shapes, tokens).compile().memory_analysis()
        assert sizes is not None and sizes.temp_size_in_bytes < stacks / 4


@pytest.mark.slow
def test_weights_of_another_form_are_not_resumed(finished, corpus, tmp_path, capsys):
    folder = shutil.copytree(finished("int8"), tmp_path / "run")
    error = refused(capsys, command(corpus, folder, "bf16+8", "--resume"))
    assert "--weights was int8, and is bf16+8" in error
