"""The command plot draws runs in one picture."""

from pathlib import Path

import pytest

import adalomo_jax.training.plots as plot_module
from adalomo_jax.cli import main
from adalomo_jax.commands.plot import run_names
from adalomo_jax.training.metrics import EvaluationRow, StepRow, append_row


def make_run(folder, loss):
    folder.mkdir(parents=True)
    rows = [EvaluationRow.of(0, loss), StepRow(1, loss - 0.5, 1.0, 1e-3, 10.0), EvaluationRow.of(1, loss - 1)]
    for row in rows:
        append_row(folder / "metrics.jsonl", row)
    return rows


def test_runs_are_drawn_by_their_names(tmp_path, capsys, monkeypatch):
    rows = {"adalomo": make_run(tmp_path / "adalomo", 3.0), "adamw": make_run(tmp_path / "adamw", 4.0)}
    drawn, plot_runs = [], plot_module.plot_runs
    monkeypatch.setattr(plot_module, "plot_runs", lambda *given: drawn.append(given) or plot_runs(*given))
    monkeypatch.chdir(tmp_path)
    main(["plot", "adalomo", "adamw", "--output", "both.png"])
    assert drawn == [(Path("both.png"), rows)]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert capsys.readouterr().out == "drawn to both.png\n"
    main(["plot", "adalomo"])
    assert (tmp_path / "runs.png").is_file()


def test_names_tell_runs_apart():
    names = lambda *folders: run_names([Path(folder) for folder in folders])
    assert names("a/x", "b/y/") == ["x", "y"]
    assert names("a/run", "b/run", "c/other") == ["a/run", "b/run", "c/other"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "plot must be followed by the output folders of runs"),
        ("nothing", "nothing is no folder; give the output folders of runs"),
        ("run nothing", "nothing is no folder"),
        ("run/metrics.jsonl", "run/metrics.jsonl is no folder"),
        ("folder", "folder holds no run: it has no metrics.jsonl"),
        ("begun", "begun has no rows in its metrics.jsonl yet"),
        ("broken", "broken/metrics.jsonl:1 is no row of a run"),
        ("run ./run", "run is named twice"),
        ("run --output folder", "--output folder is a folder, not a file"),
        ("run --output nothing/a.png", "--output nothing/a.png cannot be written"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run", 3.0)
    for name, text in {"begun": "", "broken": "{}\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["plot", *arguments.split()])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("adalomo-jax: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
