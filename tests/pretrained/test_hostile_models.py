"""Any folder or GGUF file is read, or refused in one line: no traceback, no hang, no gigabytes.

This process reads it with capped memory and time: a fault must be found before much is done.
"""

import dataclasses
import json
import signal

import numpy as np
import pytest
from hostile_bytes import flipped_cases
from hostile_configs import FIELDS, config_cases, config_file_cases, scaling_cases
from hostile_ggufs import gguf_cases, gguf_field_cases
from hostile_models import CONFIG, INDEX, SINGLE, SIZES, Case, TookTooLong, capped, folder_with, outcome, tensors
from hostile_weights import finite_cases, index_cases, safetensors_cases
from safetensors import safe_open
from safetensors.numpy import save, save_file

from adalomo_jax.commands.memory_options import model_sizes
from adalomo_jax.inputs import InputError
from adalomo_jax.models import make_mesh, param_shardings
from adalomo_jax.models.config import config_of
from adalomo_jax.pretrained import source
from adalomo_jax.pretrained.by_name import find_model
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.export import KEPT_FILES, copy_files, export_config
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.pretrained.names import param_shapes

KINDS = {
    **{field: lambda field=field: config_cases(field) for field in FIELDS},
    "rope_scaling's": scaling_cases,
    "config.json": config_file_cases,
    "index": index_cases,
    "safetensors": safetensors_cases,
    "finite": finite_cases,
    "GGUF": gguf_cases,
    "metadata": gguf_field_cases,
    "flipped": lambda: flipped_cases(40),
}
"""Cases by kind."""
FAST = {
    "hidden_size": 1,
    "rope_theta": 1,
    "rope_scaling's": 3,
    "config.json": 1,
    "index": 1,
    "safetensors": 1,
    "GGUF": 2,
}
FAST |= {"metadata": 38, "finite": 62, "flipped": 18}
"""The fast tier tries every n-th case of these kinds."""
WITH_WEIGHTS = ("finite", "flipped")
"""The kinds whose faults show, or may show, only when the weights are read."""


def faults(cases, folder, *, loads=False):
    """Return what is wrong with how the cases are read, if anything. With ``loads`` the weights are read, too."""
    found = []
    for i, case in enumerate(cases):
        try:
            said = outcome(case, folder / str(i), loads=loads)
        except BaseException as error:  # such as the PanicException of Rust's libraries
            found.append(f"{case.name}: {type(error).__name__} {error!s:.200}")
            continue
        if said is None and case.is_right is False:
            found.append(f"{case.name}: it was read")
        elif said is not None and (case.is_right or len(said) >= 400 or not said.isprintable()):
            found.append(f"{case.name}: {said[:500]!r}")
    return found


@pytest.mark.parametrize("kind", FAST)
def test_a_sample_of_each_kind(tmp_path, kind):
    cases = KINDS[kind]()[:: FAST[kind]]
    assert cases and not faults(cases, tmp_path, loads=kind == "finite")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_each_kind(tmp_path, kind):
    assert not faults(KINDS[kind](), tmp_path, loads=kind in WITH_WEIGHTS)


def test_what_is_read_though_it_is_broken_is_found(tmp_path):
    cases = [
        Case("right", folder_with),
        Case("refused", lambda folder: folder_with(folder, {}), is_right=True),
        Case("another error", lambda folder: folder_with(folder, 1 // 0)),
        Case("as it should be", lambda folder: folder_with(folder, {})),
    ]
    wrong = [found.split(": ")[:2] for found in faults(cases, tmp_path)]
    assert wrong[0] == ["right", "it was read"] and wrong[1][0] == "refused" and len(wrong) == 3
    assert wrong[2] == ["another error", "ZeroDivisionError integer division or modulo by zero"]


@pytest.mark.parametrize(("act", "error"), [(lambda: bytearray(3 << 30), MemoryError), (signal.pause, TookTooLong)])
def test_the_reader_is_capped(act, error):
    with pytest.raises(error), capped(1, 1.0):
        act()


def test_memory_checks_a_config_too(tmp_path):
    for case in [*config_cases("hidden_size"), *config_cases("rms_norm_eps"), *scaling_cases()[::7]]:
        (folder := tmp_path / case.name).mkdir()
        path = case.write(folder) / "config.json"
        if case.is_right:
            assert model_sizes(str(path), {}).hidden_size == SIZES.hidden_size
        else:
            with pytest.raises(InputError) as refused:
                model_sizes(str(path), {})
            said = str(refused.value).replace(str(path), "")
            assert said.startswith("--model : ") and said.isprintable() and len(said) < 400


def test_a_message_names_file_field_value_and_what_is_allowed(tmp_path):
    path = folder_with(tmp_path, CONFIG | {"rope_scaling": {"rope_type": "linear", "factor": 0.25}})
    with pytest.raises(ValueError) as refused:
        open_checkpoint(path)
    assert str(refused.value) == (
        f"{path}/config.json: rope_scaling.factor must be greater than or equal to 1, got 0.25"
    )
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight must be of finite numbers, and has NaN, infin"):
        name = "model.layers.0.mlp.up_proj.weight"
        path = folder_with(tmp_path, weight_bytes=save(tensors() | {name: np.full_like(tensors()[name], np.nan)}))
        load_params(SIZES, open_checkpoint(path).source, "float32")


def test_a_value_that_the_type_of_the_weights_cannot_hold(tmp_path):
    """3.4e38 is finite in float32 and infinite in bfloat16."""
    name = "model.norm.weight"
    path = folder_with(tmp_path, weight_bytes=save(tensors() | {name: np.full_like(tensors()[name], 3.4e38)}))
    source = open_checkpoint(path).source
    load_params(SIZES, source, "float32")
    with pytest.raises(ValueError, match="model.norm.weight must be .* what bfloat16 cannot hold"):
        load_params(SIZES, source, "bfloat16")


def test_weights_on_a_mesh_are_checked_too(tmp_path):
    name, mesh = "model.layers.1.self_attn.k_proj.weight", make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    broken = tensors()[name].copy()
    broken[-1, -1] = np.inf
    path = folder_with(tmp_path, weight_bytes=save(tensors() | {name: broken}))
    with pytest.raises(ValueError, match=f"{name} must be of finite numbers"):
        load_params(SIZES, open_checkpoint(path).source, "float32", param_shardings(param_shapes(SIZES), mesh))


# The index.


def split(folder, places, **others):
    """Write the model to the files in ``places``, with their index; ``others`` are further tensors by file."""
    folder_with(folder)
    (folder / SINGLE).unlink()
    for file in sorted(set(places.values())):
        held = {name: tensors()[name] for name, at in places.items() if at == file}
        save_file(held | others.get(file.split(".")[0], {}), folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("head_at", ["a", "z"])
def test_the_index_decides_which_of_two_files_a_tensor_is_read_from(tmp_path, head_at):
    places = {name: "m.safetensors" for name in tensors()} | {"lm_head.weight": f"{head_at}.safetensors"}
    stale = {"lm_head.weight": np.full_like(tensors()["lm_head.weight"], 7.0), "never.named": np.zeros(3, np.int8)}
    model = find_model(str(split(tmp_path, places, m=stale)))
    assert model.checkpoint is not None
    np.testing.assert_array_equal(model.checkpoint.source.read("lm_head.weight", ()), tensors()["lm_head.weight"])
    assert set(model.checkpoint.source.shapes) == set(tensors())


def test_only_files_that_the_index_names_are_opened(tmp_path, monkeypatch):
    split(tmp_path, {name: f"{name[-7]}.safetensors" for name in tensors()})
    (tmp_path / "other.safetensors").write_bytes(b"never read")
    opened = []
    monkeypatch.setattr(source, "safe_open", lambda path, kind: opened.append(path.name) or safe_open(path, kind))
    find_model(str(tmp_path))
    assert sorted(opened) == sorted({f"{name[-7]}.safetensors" for name in tensors()})


def test_a_single_file_goes_before_the_index(tmp_path):
    """Transformers does the same, see `SafetensorsSource`."""
    split(tmp_path, {name: "m.safetensors" for name in tensors()})
    changed = {name: 2 * value for name, value in tensors().items()}
    save_file(changed, tmp_path / SINGLE)
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path).source.read("lm_head.weight", ()), changed["lm_head.weight"]
    )


# Links, and copied files.


def as_in_the_cache(root, *, blob):
    """Make a snapshot as in Hugging Face's cache: links to blobs, named by their hash."""
    snapshot, blobs = root / "models--a--b/snapshots/1", root / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    folder_with(snapshot)
    (snapshot / "vocab.json").write_text("{}")
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / blob(i))
        file.symlink_to(f"../../blobs/{blob(i)}")
    return snapshot


def test_a_snapshot_in_hugging_faces_cache_is_links_to_blobs(tmp_path):
    snapshot = as_in_the_cache(tmp_path, blob=lambda i: f"{i:064x}")
    assert find_model(str(snapshot)).config == SIZES
    (tmp_path / "out").mkdir()
    copy_files(snapshot, tmp_path / "out")
    assert (tmp_path / "out/vocab.json").read_text() == "{}" and not (tmp_path / "out/vocab.json").is_symlink()
    (linked := tmp_path / "linked").symlink_to(snapshot)
    assert find_model(str(linked)).config == SIZES
    with pytest.raises(ValueError, match="must be in the folder itself, or link to a blob in Hugging Face's cache"):
        find_model(str(as_in_the_cache(tmp_path / "no", blob=lambda i: f"secret-{i}")))


@pytest.mark.parametrize("name", KEPT_FILES)
def test_no_link_to_elsewhere_is_copied(tmp_path, name):
    (secret := tmp_path / "id_rsa").write_text("secret")
    (model := tmp_path / "model").mkdir()
    (out := tmp_path / "out").mkdir()
    (folder_with(model) / name).symlink_to(secret)
    for act in (lambda: find_model(str(model)), lambda: copy_files(model, out)):
        with pytest.raises(ValueError, match=f"{name} must be in the folder itself"):
            act()
    assert not list(out.iterdir())


def test_a_link_within_the_folder_is_right(tmp_path):
    folder_with(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "weights")
    (tmp_path / SINGLE).symlink_to("weights")
    assert find_model(str(tmp_path)).config == SIZES


def test_a_config_of_halves_of_pairs_can_be_written_again(tmp_path):
    contents = CONFIG | {"_name": "\ud800 \u00e9"}
    export_config(tmp_path, SIZES, "float32", contents)
    assert json.loads((tmp_path / "config.json").read_text()) == contents


def test_sizes_below_1_are_no_config():
    fields = dataclasses.asdict(SIZES)
    for name in ("num_key_value_heads", "head_dim", "vocab_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            config_of(fields | {name: 0})
