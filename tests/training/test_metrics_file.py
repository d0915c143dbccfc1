"""Rows are written to their file and TensorBoard's, and drawn in pictures."""

import importlib
import json
import math
import struct
import time

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from tiers import slow

import adalomo_jax.training.plots as plot_module
from adalomo_jax.training.metrics import EvaluationRow, StepRow, append_row, layer_medians, read_rows
from adalomo_jax.training.plots import plot_losses, plot_run, plot_runs
from adalomo_jax.training.tensorboard import event_file, scalars

protocol = importlib.import_module("tensorboardX.proto.event_pb2")  # generated at run time: no type checker knows it
UPDATES = {
    "embed_tokens/embedding": 7.0,
    "layers/mlp/up_proj/kernel": [1.0, 2.0, 3.0],
    "layers/mlp/down_proj/kernel": [2.0, 4.0, 9.0],
    "layers/self_attn/q_proj/kernel": [3.0, 3.0, 4.0],
    "layers/self_attn/q_proj/bias": [99.0, 99.0, 99.0],
    "layers/input_layernorm/weight": [99.0, 99.0, 99.0],
}
ROWS = [
    EvaluationRow.of(0, 3.0),
    StepRow(1, 2.9, 1.5, 1e-3, 100.0, UPDATES),
    StepRow(2, 2.7, 1.4, 2e-3, 110.0, {path: np.multiply(x, 2).tolist() for path, x in UPDATES.items()}),
    EvaluationRow.of(2, 2.5),
]


def events_in(folder):
    """The events that TensorBoard reads from each file in order; a record is a length, an event and two checksums."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield protocol.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def shown(folder):
    """``{(tag, step): values}`` as in TensorBoard, which forgets what a later start of the run purges."""
    found = {}
    for event in events_in(folder):
        if event.session_log.status == protocol.SessionLog.START:
            found = {key: values for key, values in found.items() if key[1] < event.step}
        for value in event.summary.value:
            found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def test_rows_are_read_as_they_were_written(tmp_path):
    broken = StepRow(3, math.nan, math.inf, 1e-3, 1.0, {"layers/a/kernel": [1.0, math.nan]})
    for row in (*ROWS, broken):
        append_row(tmp_path / "m", row)
    *found, last = read_rows(tmp_path / "m")
    assert found == ROWS
    assert isinstance(last, StepRow) and math.isnan(last.loss) and math.isnan(last.grad_norm) and last.step == 3
    np.testing.assert_array_equal(last.update_rms["layers/a/kernel"], [1.0, math.nan])


def test_a_row_without_updates_does_not_name_them(tmp_path):
    append_row(tmp_path / "m", StepRow(1, 2.0, 1.0, 1e-3, 1.0))
    assert "update_rms" not in json.loads((tmp_path / "m").read_text())
    assert read_rows(tmp_path / "m") == [StepRow(1, 2.0, 1.0, 1e-3, 1.0)]


@pytest.mark.parametrize("line", ["{", "[]", "1", '{"step": 1}', '{"eval_loss": 2.0, "colour": 1}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    append_row(tmp_path / "m", ROWS[0])
    with (tmp_path / "m").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="m:2 is no row of a run"):
        read_rows(tmp_path / "m")


def test_layers_are_seen_by_the_median_of_their_matrices():
    assert layer_medians(ROWS[1]).tolist() == [2.0, 3.0, 4.0]
    assert layer_medians(StepRow(1, 2.0, 1.0, 1e-3, 1.0)).tolist() == []


def test_tensorboard_has_every_number(tmp_path):
    with event_file(tmp_path) as write:
        for row in ROWS:
            write(row)
    expected = {(tag, row.step): [pytest.approx(value)] for row in ROWS for tag, value in scalars(row).items()}
    assert shown(tmp_path) == expected
    tags = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "eval_loss", "perplexity"}
    assert {tag for tag, _ in expected} == tags | {f"update_rms/layer_0{i}" for i in range(3)}
    assert expected["update_rms/layer_02", 1] == [4.0] and expected["eval_loss", 2] == [2.5]


@pytest.mark.parametrize("told", [True, False])
def test_a_resumed_run_shows_no_step_twice(tmp_path, told, monkeypatch):
    with event_file(tmp_path) as write:
        for step in range(1, 7):
            write(StepRow(step, float(step), 1.0, 1e-3, 1.0))
    later = time.time() + 5
    monkeypatch.setattr(time, "time", lambda: later)  # the file name contains the time in seconds
    with event_file(tmp_path, first_step=4 if told else None) as write:
        for step in range(4, 9):
            write(StepRow(step, float(step), 1.0, 1e-3, 1.0))
    losses = {step: values for (tag, step), values in shown(tmp_path).items() if tag == "loss"}
    assert sorted(losses) == list(range(1, 9))
    assert all(len(values) == 1 for values in losses.values()) == told


def test_a_run_that_begins_again_shows_no_step_twice(tmp_path, monkeypatch):
    later = time.time() + 5
    for count in (4, 3):
        with event_file(tmp_path) as write:
            for step in range(count):
                write(StepRow(step, float(step), 1.0, 1e-3, 1.0))
        monkeypatch.setattr(time, "time", lambda: later)  # the file name contains the time in seconds
    losses = {step: values for (tag, step), values in shown(tmp_path).items() if tag == "loss"}
    assert losses == {step: [float(step)] for step in range(3)}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    figures = []

    def canvas(figure):
        figures.append(figure)
        return FigureCanvasAgg(figure)

    monkeypatch.setattr(plot_module, "FigureCanvasAgg", canvas)
    return figures


def test_a_run_s_picture_has_what_the_rows_say(tmp_path, drawn):
    plot_run(tmp_path / "run.png", ROWS, "tiny")
    losses, rate, norm, updates = drawn[0].axes
    lines = lambda axes: [line.get_xydata().tolist() for line in axes.lines]
    assert lines(losses) == [[[1, 2.9], [2, 2.7]], [[0, 3.0], [2, 2.5]]]
    assert lines(rate) == [[[1, 1e-3], [2, 2e-3]]]
    assert lines(norm) == [[[1, 1.5], [2, 1.4]]]
    assert lines(updates) == [[[1, 2], [2, 4]], [[1, 3], [2, 6]], [[1, 4], [2, 8]]]
    assert len({to_hex(line.get_color()) for line in updates.lines}) == 3
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_runs_share_a_picture_and_each_has_a_colour(tmp_path, drawn):
    other = [StepRow(1, 3.5, 1.0, 1e-4, 1.0), StepRow(2, math.nan, 0.0, 1e-4, 1.0), EvaluationRow.of(2, 3.25)]
    plot_runs(tmp_path / "runs.png", {"adalomo": ROWS, "adamw": other})
    figure = drawn[0]
    assert [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes] == [
        [[3.0, 2.5], [3.25]],
        [[2.9, 2.7], [3.5]],
        [[1e-3, 2e-3], [1e-4, 1e-4]],
        [[1.5, 1.4], [1.0, 0.0]],
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["adalomo", "adamw"]
    for axes in figure.axes:
        assert [to_hex(line.get_color()) for line in axes.lines] == [to_hex("C0"), to_hex("C1")]


@pytest.mark.parametrize(
    "rows", [[], slow([EvaluationRow.of(0, 3.0)]), slow([StepRow(1, math.nan, 0.0, 0.0, 1.0, {"a/kernel": [0.0]})])]
)
def test_pictures_of_little_are_drawn_all_the_same(tmp_path, rows):
    plot_losses(tmp_path / "loss.png", rows, "little")
    plot_run(tmp_path / "run.png", rows, "little")
    plot_runs(tmp_path / "runs.png", {"little": rows})
    assert len(list(tmp_path.iterdir())) == 3
