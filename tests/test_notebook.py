"""The notebook's cells run at toy size, on the CPU, as they are; only their parameters are others."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "colab_tpu.ipynb"
TOY = {
    "MODEL": "tiny",
    "WEIGHTS": "int8",
    "STEPS, SEQ_LEN, LEARNING_RATE": (4, 64, 1e-2),
    "PROMPT": "To be",
    "CHAT": False,
}


def source_of(cell):
    return "".join(cell["source"]) if isinstance(cell["source"], list) else cell["source"]


def test_its_parameters_are_the_ones_that_the_test_replaces():
    (parameters,) = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["metadata"].get("tags") == ["parameters"]
    ]
    names = [line.split(" = ")[0] for line in source_of(parameters).splitlines()]
    assert {*TOY, "DATA", "OUTPUT"} <= {*names}


@pytest.mark.slow
def test_all_cells_run(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n\n" * 200)
    toy = TOY | {"DATA": str(tmp_path / "text.txt"), "OUTPUT": str(tmp_path / "run")}
    (parameters,) = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in toy.items())
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    assert any(text.startswith("held-out loss") for text in said)
    assert said[-2].startswith("To be")
    assert (tmp_path / "run" / "model.safetensors").exists()
