"""Weights are written to a Hugging Face folder and read back."""

import dataclasses
import json
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import FAMILIES, LLAMA, QWEN2, random_params, tensors_in
from tiers import slow

from adalomo_jax.models import PRESETS, make_mesh, param_shardings, to_hugging_face
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.export import copy_files, export_config, export_params
from adalomo_jax.pretrained.load import check_tensors, load_params
from adalomo_jax.pretrained.names import param_shapes, tensors_of


def write(folder, config, params, dtype="float32", **options):
    folder.mkdir(exist_ok=True)
    export_params(folder, params, config, **options)
    export_config(folder, config, dtype)
    return open_checkpoint(folder)


def test_layers_are_apart_and_matrices_turned(tmp_path):
    params = random_params(LLAMA)
    write(tmp_path, LLAMA, params)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == 3 + 9 * LLAMA.num_hidden_layers
    queries = params["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], queries[1].T)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["kernel"].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed_tokens"]["embedding"])


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


ALWAYS = [
    *(("llama", "float32"), ("phi-4-mini", "bfloat16")),
]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        (family, dtype) if (family, dtype) in ALWAYS else slow(family, dtype)
        for family in FAMILIES
        for dtype in ("float32", "bfloat16")
    ],
)
def test_what_is_written_is_read_back_to_the_bit(tmp_path, family, dtype):
    config, params = FAMILIES[family], random_params(FAMILIES[family], dtype)
    found = write(tmp_path, config, params, dtype)
    assert (found.config, found.source.dtype) == (config, dtype)
    assert bits(load_params(found.config, found.source, dtype)) == bits(params)


@pytest.mark.parametrize("prefix", [slow("language_model.model."), "model.language_model."])
def test_of_a_multimodal_checkpoint_the_text_part_is_read_and_written(tmp_path, prefix):
    config, params = FAMILIES["gemma-3"], random_params(FAMILIES["gemma-3"], "bfloat16")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    renamed = {prefix + name.removeprefix("model."): x for name, x in tensors_in(params, config).items()}
    vision = {"vision_tower.embeddings.weight": np.zeros((2, 3), np.float32)}
    save_file(renamed | vision, theirs / "model.safetensors")
    text = to_hugging_face(config, "bfloat16")
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (theirs / "config.json").write_text(json.dumps(whole | {"vision_config": {"hidden_size": 3}, "mm_tokens": 4}))
    found = open_checkpoint(theirs)
    assert found.config == config
    loaded = load_params(found.config, found.source, "bfloat16")
    assert bits(loaded) == bits(params)
    export_params(ours, loaded, config)
    export_config(ours, config, "bfloat16", found.hugging_face)
    again = open_checkpoint(ours)
    assert again.config == config and again.hugging_face and again.hugging_face["model_type"] == "gemma3_text"
    assert bits(load_params(again.config, again.source, "bfloat16")) == bits(params)


def test_several_files_and_their_index(tmp_path):
    params = random_params(LLAMA)
    found = write(tmp_path, LLAMA, params, shard_bytes=50_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 50_000 for file in files)
    assert bits(load_params(LLAMA, found.source, "float32")) == bits(params)


def test_a_checkpoint_of_others_comes_out_as_it_came_in(tmp_path):
    """This holds for tensors, fields of ``config.json`` that are not used here, and the tokenizer's files."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    tensors = tensors_in(random_params(QWEN2, "bfloat16"), QWEN2)
    save_file(tensors, theirs / "model.safetensors")
    export_config(theirs, QWEN2, "bfloat16")
    contents = json.loads((theirs / "config.json").read_text()) | {"bos_token_id": 7, "transformers_version": "4.0"}
    (theirs / "config.json").write_text(json.dumps(contents))
    (theirs / "tokenizer.json").write_text('{"é": 1}')
    found = open_checkpoint(theirs)
    ours.mkdir()
    export_params(ours, load_params(found.config, found.source, found.source.dtype), found.config)
    export_config(ours, found.config, found.source.dtype, found.hugging_face)
    copy_files(theirs, ours)
    assert json.loads((ours / "config.json").read_text()) == contents
    assert (ours / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    written = load_file(ours / "model.safetensors")
    assert {name: x.tobytes() for name, x in written.items()} == {name: x.tobytes() for name, x in tensors.items()}
    assert sorted(path.name for path in ours.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("sizes", [slow({"fsdp": 8}), {"fsdp": 2, "tensor": 2, "data": 2}])
def test_each_device_gets_its_part(tmp_path, sizes):
    params, mesh = random_params(QWEN2), make_mesh(sizes)
    found = write(tmp_path, QWEN2, params)
    read = []

    class Watched:
        shapes, dtype = found.source.shapes, found.source.dtype

        def read(self, name, index):
            part = found.source.read(name, index)
            read.append((name, part.shape))
            return part

    shardings = param_shardings(param_shapes(QWEN2), mesh)
    loaded = load_params(QWEN2, Watched(), "float32", shardings)
    chex.assert_trees_all_equal(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    whole = {tensor.name: tensor.shape for tensor in tensors_of(QWEN2)}
    assert all(np.prod(shape) < np.prod(whole[name]) for name, shape in read if "_proj.weight" in name)


def test_all_mismatches_are_in_one_error(tmp_path):
    tensors = tensors_in(random_params(LLAMA), LLAMA)
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["lm_head.weight"] = np.zeros((97, 64), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    export_config(tmp_path, LLAMA, "float32")
    with pytest.raises(ValueError) as refused:
        load_params(LLAMA, open_checkpoint(tmp_path).source, "float32")
    message = str(refused.value)
    assert "1 missing: model.norm.weight" in message and "\n" not in message
    assert "1 unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert "1 of another shape: lm_head.weight is [97, 64] and not [96, 64]" in message


def test_what_older_checkpoints_hold_besides_is_no_mismatch(tmp_path):
    config = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    tensors = tensors_in(random_params(config), config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    export_config(tmp_path, config, "float32")
    source = open_checkpoint(tmp_path).source
    check_tensors(config, source)
    with pytest.raises(ValueError, match="missing"):
        check_tensors(dataclasses.replace(config, num_hidden_layers=4), source)


def break_weights(folder, change):
    path = folder / "model.safetensors"
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "missing":
        path.unlink()
    elif change == "quantized":
        save_file({"model.norm.weight": np.zeros(4, np.int8)}, path)
    elif change == "no config":
        (folder / "config.json").unlink()
    elif change == "no JSON":
        (folder / "config.json").write_text("{")
    else:
        path.unlink()  # otherwise it would be read without the index
        index = {"weight_map": {"model.norm.weight": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", "is no whole safetensors file"),
        ("missing", "has neither model.safetensors nor model.safetensors.index.json"),
        ("quantized", "must be one of F64, F32, F16, BF16, got I8"),
        ("no config", "config.json cannot be read"),
        ("no JSON", "config.json cannot be read"),
        ("a lost file", "lacks a.safetensors, which its model.safetensors.index.json names"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(tmp_path, change, message):
    write(tmp_path, LLAMA, random_params(LLAMA))
    break_weights(tmp_path, change)
    with pytest.raises(ValueError) as refused:
        open_checkpoint(tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "broken.gguf").write_bytes(b"GGUFx")
    for name, message in (
        ("nowhere", "there is no file or folder"),
        ("weights.bin", "must be a folder in Hugging Face's format"),
        ("broken.gguf", "is no whole GGUF file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / name)


PEAK = """
import sys, threading, time
from pathlib import Path
import jax
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.load import load_params

def used():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])

def watch():
    while not done:
        peaks[0] = max(peaks[0], used())
        time.sleep(0.001)

small, large = map(open_checkpoint, sys.argv[1:])
load_params(small.config, small.source, "float32")  # what JAX itself takes
done, before = False, used()
peaks = [before]
thread = threading.Thread(target=watch)
thread.start()
params = load_params(large.config, large.source, "float32")
done = True
thread.join()
print(peaks[0] - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_in_memory_are_the_weights_and_one_tensor(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=16384, hidden_size=512, intermediate_size=2048)
    config = dataclasses.replace(config, num_hidden_layers=8, tie_word_embeddings=True)
    write(tmp_path / "small", LLAMA, random_params(LLAMA))
    write(tmp_path / "large", config, random_params(config))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"], capture_output=True, text=True, check=True
    )
    peak, weights = map(int, done.stdout.split())
    largest = 4 * config.vocab_size * config.hidden_size
    shutil.rmtree(tmp_path / "large")
    assert weights < peak < weights + 1.25 * largest
