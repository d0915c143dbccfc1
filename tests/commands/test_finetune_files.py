"""Files are whole or absent, and the configuration has the Hugging Face layout."""

import json

import pytest

from adalomo_jax.memory.usage import format_bytes
from adalomo_jax.models import PRESETS, to_hugging_face
from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.training.memory_use import peak_bytes
from adalomo_jax.training.metrics import EvaluationRow, StepRow, append_row


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def write(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        write_whole(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_write_replaces(tmp_path):
    (tmp_path / "file").write_text("old")
    write_whole(tmp_path / "file", lambda path: path.write_text("new"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_rows_are_json_even_when_training_diverged(tmp_path):
    append_row(tmp_path / "m", EvaluationRow.of(0, 2.0))
    append_row(tmp_path / "m", StepRow(1, float("nan"), float("inf"), 1e-3, 100.0))
    first, second = map(json.loads, (tmp_path / "m").read_text().splitlines())
    assert first == {"step": 0, "eval_loss": 2.0, "perplexity": pytest.approx(7.389056)}
    assert second == {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 1e-3, "tokens_per_second": 100.0}


def test_config_json_names_a_llama():
    config = to_hugging_face(PRESETS["smollm2-135m"], "bfloat16")
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert (config["hidden_size"], config["num_key_value_heads"], config["rope_theta"]) == (576, 3, 100000.0)
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "not known"), (12, "12 B"), (1500, "1.50 kB"), (2_500_000, "2.50 MB"), (16e9, "16.00 GB")],
)
def test_bytes_are_readable(count, text):
    assert format_bytes(count) == text


def test_this_process_has_a_peak():
    peak = peak_bytes()
    assert peak is not None
    assert 10**7 < peak < 10**12
