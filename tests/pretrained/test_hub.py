"""Models are fetched from a hub by their names, as far as they are needed, and its errors are one line."""

import json
import shutil
import socket
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hub_server import serving
from huggingface_hub import constants
from small_models import QWEN3, random_params

from adalomo_jax.cli import main
from adalomo_jax.pretrained import hub
from adalomo_jax.pretrained.by_name import find_model
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.export import export_config, export_params
from adalomo_jax.pretrained.load import load_params

NAME = "some/tiny"
PARAMS = random_params(QWEN3)


def point_to(address, monkeypatch):
    """As ``HF_ENDPOINT`` does for a process that begins."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with one model, which has more files than are needed; and an empty cache."""
    folder = tmp_path / "hub" / "models" / NAME
    folder.mkdir(parents=True)
    export_params(folder, PARAMS, QWEN3)
    export_config(folder, QWEN3, "float32")
    for name in ("modeling_tiny.py", "pytorch_model.bin", "tiny.gguf", "README.md", "optimizer.pkl"):
        (folder / name).write_text("import os")
    (folder / "generation_config.json").write_text("{}")
    with serving(tmp_path / "hub") as (served, address):
        point_to(address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield SimpleNamespace(hub=served, folder=folder, cache=tmp_path / "cache", address=address)


def fetched_files(served):
    return {line.rsplit("/", 1)[1] for line in served.hub.asked if line.startswith("GET") and "/resolve/" in line}


def test_it_is_the_model_and_is_fetched_once(served):
    said = []
    folder = hub.fetch_model(NAME, said.append)
    found = open_checkpoint(folder)
    assert found.config == QWEN3
    jax.tree.map(np.testing.assert_array_equal, load_params(QWEN3, found.source, "float32"), PARAMS)
    assert fetched_files(served) == {"config.json", "generation_config.json", "model.safetensors"}
    weights = (served.folder / "model.safetensors").stat().st_size
    (download,) = said
    assert download.missing_bytes == weights and download.config["model_type"] == "qwen3"
    assert str(download) == f"fetching {NAME}: 0.00 of 0.00 GB, into {served.cache}"
    served.hub.asked.clear()
    assert hub.fetch_model(NAME, said.append) == folder
    assert not fetched_files(served) and len(said) == 1


def test_memory_is_told_of_a_model_whose_sizes_alone_are_fetched(served, capsys):
    main(["memory", "--model", NAME, "--device", "cpu", "--estimate", "--json"])
    weights = sum(w.size for w in jax.tree.leaves(PARAMS))
    assert json.loads(capsys.readouterr().out)["params_bytes"] == 2 * weights
    assert fetched_files(served) == {"config.json"}
    with pytest.raises(SystemExit):
        main(["memory", "--model", "some/typo"])
    assert "no file or folder some/typo, and no model of that name on" in capsys.readouterr().err


def test_a_revision_is_fetched_by_its_name(served):
    commit = served.hub.commit("models", NAME).hexdigest()
    assert hub.fetch_model(f"{NAME}@{commit}").name == commit
    with pytest.raises(ValueError, match=f"{NAME} has no revision nope"):
        hub.fetch_model(f"{NAME}@nope")


def test_a_connection_that_is_cut_goes_on(served):
    served.hub.cut_after["model.safetensors"] = 5000
    folder = hub.fetch_model(NAME)
    assert (folder / "model.safetensors").read_bytes() == (served.folder / "model.safetensors").read_bytes()
    assert sum("GET" in line and "model.safetensors" in line for line in served.hub.asked) == 2


def test_a_fetch_that_ended_goes_on_when_it_is_asked_for_again(served):
    def fails(download):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch_model(NAME, fails)
    assert fetched_files(served) == {"config.json", "generation_config.json"}  # nothing large before it may
    assert (hub.fetch_model(NAME) / "model.safetensors").exists()


def test_without_a_network_it_comes_from_the_cache(served, monkeypatch):
    folder = hub.fetch_model(NAME)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
        assert hub.fetch_model(NAME) == folder
        with pytest.raises(
            ValueError, match="no file or folder some/other; .* cannot be reached, and .* cache .* does not have all"
        ):
            hub.fetch_model("some/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch_model(NAME) == folder
    with pytest.raises(
        ValueError, match="no file or folder some/other; .* HF_HUB_OFFLINE forbids to ask, .* does not have all"
    ):
        hub.fetch_model("some/other")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not have all of it"):
        hub.fetch_model(NAME)


def test_what_cannot_be_fetched_is_refused_with_the_way_out(served, monkeypatch):
    with pytest.raises(ValueError, match=f"no file or folder some/typo, and no model of that name on {served.address}"):
        hub.fetch_model("some/typo")
    served.hub.gated.add(NAME)
    with pytest.raises(ValueError, match=f"gated: accept its terms at {served.address}/{NAME}, then give your"):
        hub.fetch_model(NAME)
    served.hub.gated.clear()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="takes 0.00 GB, and .* has 0.00 GB free: make room, or name another folder"):
        hub.fetch_model(NAME)
    assert "model.safetensors" not in fetched_files(served)
    (served.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights as safetensors; other formats are not read"):
        hub.fetch_model(NAME)


def test_a_model_that_cannot_fit_is_refused_before_it_is_fetched(served, capsys, tmp_path):
    sizes = json.loads((served.folder / "config.json").read_text())
    (served.folder / "config.json").write_text(json.dumps(sizes | {"num_hidden_layers": 9999, "hidden_size": 65536}))
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--model", NAME, "--output", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert f"--model {NAME} needs at least" in said and "take --weights int8" in said
    assert "model.safetensors" not in fetched_files(served)


def test_commands_take_the_name(served, monkeypatch):
    monkeypatch.setattr("adalomo_jax.pretrained.by_name._tokenizer", lambda checkpoint: SimpleNamespace(vocab_size=96))
    said = []
    found = find_model(NAME, said.append)
    assert found.name == "tiny" and found.config == QWEN3 and len(said) == 1
    assert find_model(NAME).checkpoint is not None
