"""``adalomo-jax bench`` measures steps and writes its files; these tests assert nothing about the times themselves."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import adalomo_jax.bench.run as run_module
import adalomo_jax.bench.steps as steps_module
from adalomo_jax.bench.config import BenchConfig
from adalomo_jax.bench.contestants import CONTESTANTS, NAMES, REFERENCE, Case, contestants_of
from adalomo_jax.bench.measure import Failed, Measured, Worker, measure, ratios_to_reference
from adalomo_jax.bench.run import run
from adalomo_jax.bench.steps import compile_step
from adalomo_jax.bench.tables import Result, line_through, memory_table, time_table
from adalomo_jax.cli import main
from adalomo_jax.inputs import InputError
from adalomo_jax.models import PRESETS
from adalomo_jax.pretrained.names import param_shapes

SMALL = dataclasses.replace(PRESETS["tiny"], hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
CASE = Case("tiny", 2, 4, 8, "bfloat16")
TINY = ["--model=tiny", "--seq-len=8", "--rounds=3"]


def measured(name, seconds, **more):
    return Measured(name, seconds, **{"compile_seconds": 1.0, "peak_bytes": 10**9, **more})


def bytes_in(weights):
    """Bytes of SMALL's weights, with matrices of layers in this form and the others in bfloat16."""
    each = {"int8": 1, "bf16+8": 3}[weights]
    return sum(x.size * (each if x.ndim >= 3 else 2) for x in jax.tree.leaves(param_shapes(SMALL)))


def printed(*tables):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables)
    return console.export_text()


OF_EACH_KIND = {
    *(REFERENCE, "adalomo, fused, int8", "adamw, unfused", "forward and backward, in place"),
}
"""The slow tier compiles and runs the steps of the other contestants, which have another optimizer or option."""


def named(contestant):
    marks = () if contestant.name in OF_EACH_KIND else pytest.mark.slow
    return pytest.param(contestant, id=contestant.name, marks=marks)


@pytest.mark.uncached
@pytest.mark.parametrize("contestant", [named(contestant) for contestant in contestants_of(CASE, None)])
def test_each_step_runs_in_the_memory_of_what_it_is_given(contestant, monkeypatch):
    ones = lambda make, _: jax.tree.map(lambda w: jnp.ones(w.shape, w.dtype), jax.eval_shape(make))
    if contestant.weights is None:
        monkeypatch.setattr(steps_module, "make_kept", ones)  # random ones need a program per leaf
    compiled = compile_step(contestant, SMALL, CASE.batch_size, CASE.seq_len, CASE.dtype)
    seconds = [compiled.step() for _ in range(3)]
    assert min(seconds) > 0 and compiled.compile_seconds > 0
    memory, weights = compiled.memory, 2 * compiled.params
    assert memory is not None
    if contestant.how == "gradients":
        assert memory["alias"] == 0 and memory["output"] >= weights
    else:
        arrays = 3 if contestant.optimizer == "adamw" else 1
        assert memory["alias"] >= arrays * (weights if contestant.weights is None else bytes_in(contestant.weights))
    assert memory["peak"] == memory["argument"] + memory["output"] - memory["alias"] + memory["temp"]


def test_all_contestants_are_of_some_case():
    wide, narrow = contestants_of(CASE._replace(dtype="float32"), None), contestants_of(CASE, None)
    assert {c.name for c in [*wide, *narrow]} == set(NAMES)
    assert [c.name for c in narrow] == [c.name for c in CONTESTANTS]
    assert "adalomo, fused, to nearest" not in {c.name for c in wide}
    assert all(c.microbatches is None for c in contestants_of(CASE._replace(batch_size=6), None))
    assert [c.name for c in contestants_of(CASE, ("sgd, unfused",))] == [REFERENCE, "sgd, unfused"]


def test_ratios_are_of_steps_of_the_same_round():
    found = [measured(REFERENCE, [1.0, 10.0, 3.0]), measured("b", [2.0, 20.0, 3.0])]
    assert ratios_to_reference(found)["b"] == (0.5, 0.5, 0.75)
    assert ratios_to_reference(found[1:]) == {}
    assert "b" not in ratios_to_reference([found[0], Measured("b", [], error="died")])


def test_a_line_through_depths_and_how_far_times_are_from_it():
    def of(seconds_at):
        depths = [4, 8, 16, 48]
        return [
            Result(CASE._replace(layers=n), [measured("x", [seconds_at(n)] * 3, compile_seconds=n)]) for n in depths
        ]

    line = line_through(of(lambda n: 0.5 + 0.25 * n), "x")
    assert line is not None and line.compile_ratio == 12
    assert (line.fixed, line.per_layer, line.largest_residual) == pytest.approx((0.5, 0.25, 0), abs=1e-9)
    curved = line_through(of(lambda n: 0.01 * n**2), "x")
    assert curved is not None and curved.largest_residual > 0.05
    assert line_through(of(float)[:2], "x") is None


def test_tables_fit_a_terminal_and_say_what_failed():
    rows = [measured(name, [123.4567, 123.5, 124.0], memory={"peak": 123_456_789}) for name in NAMES]
    rows.append(Measured("lomo-optim (PyTorch)", [], error="was killed, as Linux does when memory runs out"))
    times = printed(time_table(Result(CASE, rows)))
    assert all(len(line) <= 80 for line in times.splitlines())
    assert "lomo-optim (PyTorch) failed" in " ".join(times.split()) and "1.000 (1.000 to 1.000)" in times
    assert "123.46 MB" in printed(memory_table(Result(CASE, rows)))


def test_one_that_fails_is_out_and_the_others_go_on():
    def worker(code):
        return lambda: Worker([sys.executable, "-c", code], {})

    answers = "import sys\nfor i, _ in enumerate(sys.stdin): print(i + 1.5 if i else '{}', flush=True)\nprint(7)"
    starts = {
        REFERENCE: worker(answers),
        "no start": worker("raise SystemExit('cannot be')"),
        "no step": worker("input(); print('{}', flush=True); input(); raise SystemExit('cannot go on')"),
        "killed": worker("import os; os.kill(os.getpid(), 9)"),
    }
    found = {one.name: one for one in measure(starts, 3, lambda doing: None)}
    assert found[REFERENCE].seconds == [4.5, 5.5, 6.5] and found[REFERENCE].peak_bytes == 7
    assert (found["no start"].error, found["no step"].error) == ("cannot be", "cannot go on")
    assert "memory runs out" in (found["killed"].error or "")
    with pytest.raises(Failed, match="cannot be"):
        starts["no start"]()


def test_the_command_says_why_one_failed(tmp_path, monkeypatch, capsys):
    failing = [measured(REFERENCE, [1.0, 1.0, 1.0]), Measured("sgd, unfused", [], error="cannot be")]
    monkeypatch.setattr(run_module, "measure", lambda starts, rounds, say: failing)
    run(BenchConfig(model=("tiny",), seq_len=(8,), output=tmp_path / "out"))
    assert "sgd, unfused: cannot be" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["cases"][0]["rows"]
    assert [row["error"] for row in rows] == [None, "cannot be"]


def test_all_may_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "measure", lambda *_: [Measured(REFERENCE, [], error="cannot be")])
    run(BenchConfig(model=("tiny",), seq_len=(8,), output=tmp_path / "out"))
    assert (tmp_path / "out" / "time.png").exists()


def check_depths(folder, said):
    """Checks what the command prints and writes for one, two and three layers."""
    assert "tiny, 3 layers, 1 x 8, float32" in said and "off a line" in said
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "depth.png", "time.png"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("depth.png", "time.png"))
    found = json.loads((folder / "bench.json").read_text())
    assert [case["layers"] for case in found["cases"]] == [1, 2, 3]
    assert set(found["depth"]["tiny, 1 x 8, float32"]) == {REFERENCE, "sgd, unfused"}


def of_depths(folder):
    main(["bench", *TINY, "--layers", "1", "2", "3", f"--output={folder}", "--only", "sgd, unfused"])


def test_the_command_draws_times_by_depth(tmp_path, monkeypatch, capsys):
    answers = lambda starts, *_: [measured(name, [1.0, 1.5, 1.25]) for name in starts]
    monkeypatch.setattr(run_module, "measure", answers)
    of_depths(tmp_path / "out")
    check_depths(tmp_path / "out", capsys.readouterr().out)


@pytest.mark.slow
def test_the_command_measures_and_draws_times_by_depth(tmp_path, capsys):
    of_depths(tmp_path / "out")
    check_depths(tmp_path / "out", capsys.readouterr().out)


@pytest.mark.slow
def test_the_command_leaves_json_and_a_picture(tmp_path, capsys):
    folder = tmp_path / "out"
    args = ["bench", *TINY, "--layers=1", f"--output={folder}"]
    main([*args, "--only", REFERENCE])
    said = capsys.readouterr().out
    assert "tiny, 1 layers, 1 x 8, float32" in said and f"written to {folder}" in said
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "time.png"]
    assert (folder / "time.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "bench.json").read_text())
    [fused] = found["cases"][0]["rows"]
    assert fused["name"] == REFERENCE
    assert len(fused["seconds"]) == 3 and fused["tokens_per_second"] == pytest.approx(8 / fused["median_seconds"])
    assert fused["peak_bytes"] > fused["memory"]["peak"] > 4 * fused["params"]
    assert found["machine"]["versions"]["jax"] and fused["device"] == "cpu"
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert "holds results already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ("tiy",)}, "unknown model 'tiy'; did you mean tiny"),
        ({"model": ()}, "--model must be followed by at least one value"),
        ({"seq_len": (1,)}, "--seq-len must be at least 2 tokens.*got 1"),
        ({"seq_len": (8, 1024)}, "--seq-len 1024 is longer than the 512 positions of tiny"),
        ({"batch_size": 0}, "--batch-size must be at least 1 sequence, got 0"),
        ({"layers": (4, 0)}, "--layers must be at least 1, got 0"),
        ({"rounds": 2}, "--rounds must be at least 3, for a median, got 2"),
        ({"only": ("adamv",)}, "--only takes adalomo, fused; .*got adamv"),
        ({"against": "lomo-optim", "dtype": ("bfloat16",)}, "--against lomo-optim"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled_or_written(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "measure", None)
    with pytest.raises(InputError, match=message):
        run(BenchConfig(**{"model": ("tiny",), "seq_len": (8,), "output": tmp_path / "out", **options}))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_official_code_is_measured_on_the_same_sizes(tmp_path):
    for name in ("torch", "transformers", "lomo_optim"):
        pytest.importorskip(name)
    config = BenchConfig(
        model=("tiny",), seq_len=(8,), rounds=3, only=(REFERENCE,), against="lomo-optim", output=tmp_path / "out"
    )
    [result] = run(config)
    ours, theirs = result.found
    assert theirs.error is None and theirs.params == ours.params and len(theirs.seconds) == 3
