"""Checkpoints: what they hold, what they refuse, and how a run goes on from one."""

import json
import os
import re
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file

import adalomo_jax.finetune.checkpoints as checkpoints
import adalomo_jax.finetune.program as program_module
import adalomo_jax.finetune.run as run_module
from adalomo_jax.cli import main
from adalomo_jax.finetune.checkpoints import Origin, best_step, open_saver, read_record, restore, restore_params
from adalomo_jax.finetune.config import FinetuneConfig, InputError
from adalomo_jax.finetune.fingerprints import checksums
from adalomo_jax.finetune.program import abstract_arrays, make_training
from adalomo_jax.fused.step import FusedStep
from adalomo_jax.models import PRESETS, Llama, make_mesh
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.load import load_params

STEPS = 6
OPTIONS = ["--batch-size", "8", "--seq-len", "16", "--keep", "3"]
ORIGIN = Origin({"dtype": "float32"}, {"name": "none"}, "0")


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", tiny.TINY)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {i} of a text that goes on\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def command(corpus):
    return ["finetune", "--data", str(corpus), *OPTIONS, "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main([*command, "--output", str(folder)])
    return folder


@pytest.fixture
def killed(finished, tmp_path):
    """A copy of the run as it was after step 5, while it wrote the checkpoint and the row of step 6."""
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    for name in ("model.safetensors", "loss.png"):
        (folder / name).unlink()
    (folder / "checkpoints" / "6").rename(folder / "checkpoints" / "6.orbax-checkpoint-tmp")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-10])
    return folder


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def rows(folder):
    """Without what depends on time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def refused(capsys, command, status=2):
    """The one line that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(command)
    captured = capsys.readouterr()
    assert stopped.value.code == status, captured
    assert captured.err.count("\n") == 1 and captured.err.startswith("adalomo-jax: "), captured.err
    return captured.err


def test_a_run_goes_on_to_the_same_bits(killed, finished, command, capsys):
    main([*command, "--output", str(killed), "--resume"])
    assert "going on after step 5\n" in capsys.readouterr().out
    assert weights(killed) == weights(finished)
    assert rows(killed) == rows(finished) and len(rows(finished)) == 2 * STEPS + 1
    assert steps_in(killed) == steps_in(finished) == [4, 5, 6]


def test_without_its_place_in_the_data_it_does_not(killed, finished, command, monkeypatch):
    found = run_module.find_checkpoint
    of_first_batch = lambda *args: found(*args)._replace(batches={"next_index": 0})  # pyright: ignore
    monkeypatch.setattr(run_module, "find_checkpoint", of_first_batch)
    main([*command, "--output", str(killed), "--resume"])
    assert weights(killed) != weights(finished)


def test_a_finished_run_says_so(finished, command, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    main([*command, "--output", str(finished), "--resume"])
    assert capsys.readouterr().out == f"the run in {finished} is finished\n"
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_without_a_checkpoint_it_begins(killed, finished, command, capsys):
    shutil.rmtree(killed / "checkpoints")
    main([*command, "--output", str(killed), "--resume"])
    assert f"going on at the beginning: there is no checkpoint in {killed}\n" in capsys.readouterr().out
    assert weights(killed) == weights(finished) and rows(killed) == rows(finished)


def test_a_run_is_not_written_over(killed, command, capsys):
    assert "holds a run already" in (said := refused(capsys, [*command, "--output", str(killed)])), said
    assert "go on with --resume" in said


def test_all_options_that_differ_are_named(killed, command, corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "build_program", None)
    (tmp_path / "other.txt").write_text(corpus.read_text().replace("line", "Line"))
    options = ["--seed", "1", "--learning-rate", "0.5", "--steps", "7", "--data", str(tmp_path / "other.txt")]
    said = refused(capsys, [*command, "--output", str(killed), "--resume", *options])
    assert "of step 5" in said and "other options" in said
    for part in ("--seed was 0, and is 1;", "--learning-rate was 0.03, and is 0.5;", "--steps was 6, and is 7;"):
        assert part in said, said
    assert re.search(r"--data led to the sequences [0-9a-f]{12}, and leads to [0-9a-f]{12};", said)
    monkeypatch.setitem(PRESETS, "tiny", tiny.dataclasses.replace(tiny.TINY, num_hidden_layers=3))
    said = refused(capsys, [*command, "--output", str(killed), "--resume"])
    assert "--model: its num_hidden_layers was 2, and is 3; give the same ones" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--resume", "--resume goes on with the run in --output: name its folder"),
        ("--resume-step 3", "--resume-step is of --resume: give it too"),
        ("--resume --output {0} --resume-step 3", "no checkpoint of this step, only those of the steps 4, 5"),
        ("--resume --output {0}/none --resume-step 3", "no checkpoint of this step, none at all"),
        ("--checkpoint-every -1", "--checkpoint-every must be 0, for none, or a number of steps, got -1"),
        ("--keep 0", "--keep must be at least 1 checkpoint, got 0"),
    ],
)
def test_what_cannot_be_resumed(options, says, killed, command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "build_program", None)
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, [*command, *options.format(killed).split()])


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken_when_asked(killed, finished, command, capsys):
    newest = killed / "checkpoints" / "5"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    resuming = [*command, "--output", str(killed), "--resume"]
    before = (killed / "metrics.jsonl").read_bytes()
    said = refused(capsys, resuming)
    assert f"the checkpoint of step 5 in {killed} is damaged: " in said
    assert "; older ones are of the steps 4; to take one, say --resume-step 4\n" in said
    assert (killed / "metrics.jsonl").read_bytes() == before and newest.exists()
    main([*resuming, "--resume-step", "4"])
    assert weights(killed) == weights(finished) and rows(killed) == rows(finished)


def test_a_foreign_folder_is_no_checkpoint(killed, command, capsys):
    shutil.rmtree(killed / "checkpoints" / "4")
    foreign = killed / "checkpoints" / "9"
    (foreign / "somewhat").mkdir(parents=True)
    said = refused(capsys, [*command, "--output", str(killed), "--resume"])
    assert "the checkpoint of step 9" in said and "older ones are of the steps 5" in said
    shutil.rmtree(foreign)
    (killed / "checkpoints" / "5").rename(foreign)
    said = refused(capsys, [*command, "--output", str(killed), "--resume"])
    assert "it says that it is of the step 5; there is no older one; begin again in another --output" in said


def trees(seed=0, size=50_000):
    normal = jax.random.normal(jax.random.key(seed), (size,))
    params = {"b": {"w": normal.reshape(50, -1)}, "a": normal[:300].astype(jnp.bfloat16)}
    return params, (optax.EmptyState(), optax.TraceState({"x": jnp.float32(seed)}), jnp.int32(seed))


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(a, b):
    bits = lambda x: np.asarray(x).tobytes()
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.map(bits, a) == jax.tree.map(bits, b)


def damages(path):
    """The folder with each of its files cut, away, or with a bit turned, one after the other."""
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        for at in sorted({len(whole) // 3, len(whole) // 2, len(whole) * 4 // 5}):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            yield file
        file.write_bytes(whole[: len(whole) // 2])
        yield file
        file.unlink()
        yield file
        file.write_bytes(whole)


@pytest.mark.parametrize("checked", [True, False])
def test_no_damage_goes_unseen(checked, tmp_path, monkeypatch):
    params, state = trees()
    with open_saver(tmp_path, ORIGIN, keep=1, after=0) as saver:
        saver.save(1, params, state, {"next_index": 1}, 2.5)
    if not checked:
        monkeypatch.setattr(checkpoints, "checksums", lambda arrays: {})
    seen, wrong = 0, 0
    for _ in damages(tmp_path / "1"):
        try:
            record = read_record(tmp_path / "1")
            restored = restore(tmp_path / "1", record, shapes(params), shapes(state))
        except ValueError:
            seen += 1
        else:
            intact = record._replace(checksums={}) == checkpoints.Record(1, {"next_index": 1}, 2.5, ORIGIN, {})
            wrong += not (intact and same(restored, (params, state)))
    assert seen >= 10
    assert (wrong == 0) == checked, wrong  # Orbax alone does not see all of it


def test_checksums_do_not_depend_on_how_arrays_are_spread():
    x = jax.random.normal(jax.random.key(0), (8, 12, 16)).astype(jnp.bfloat16)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor")))
    assert checksums({"x": x}) == checksums({"x": spread})
    for other in (x.at[3, 4, 5].multiply(2), x[::-1], x.reshape(12, 8, 16)[:, ::-1]):
        assert checksums({"x": x}) != checksums({"x": other})


def test_a_step_at_once_does_not_change_what_is_written(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: (x + 1).astype(x.dtype), tree), donate_argnums=0)
    params, state = trees(size=5_000_000)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), (params, state))
    with open_saver(tmp_path, ORIGIN, keep=1, after=0) as saver:
        saver.save(1, params, state, {}, None)
        now = params, state
        for _ in range(3):
            now = step(now)
        jax.block_until_ready(now)
    assert same(restore(tmp_path / "1", read_record(tmp_path / "1"), shapes(params), shapes(state)), expected)
    assert not same(now, expected)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    params, state = trees(size=50)
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: None, 5: float("nan"), 6: 1.75}
    with open_saver(tmp_path, ORIGIN, keep=2, after=0) as saver:
        for step in (1, 2, 3):
            saver.save(step, params, state, {}, losses[step])
    with open_saver(tmp_path, ORIGIN, keep=2, after=3) as saver:
        for step in (4, 5, 6):
            saver.save(step, params, state, {}, losses[step])
    assert checkpoints.steps_in(tmp_path) == [2, 5, 6]
    assert best_step(tmp_path) == 2
    with open_saver(tmp_path, ORIGIN, keep=2, after=5):
        assert checkpoints.steps_in(tmp_path) == [2, 5]


def test_a_full_disk_loses_no_older_checkpoint(tmp_path):
    small, large = trees(size=100), trees(size=500_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(InputError, match="could not be written: .*; there are those of the steps 1; ") as error:
        with open_saver(tmp_path, ORIGIN, keep=1, after=0) as saver:
            saver.save(1, *small, {}, 1.0)
            saver.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be longer
            try:
                saver.save(2, *large, {}, 0.5)
                saver.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert checkpoints.steps_in(tmp_path) == [1]
    assert same(restore(tmp_path / "1", read_record(tmp_path / "1"), *map(shapes, small)), small)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=["device", "mesh"])
@pytest.mark.parametrize("optimizer", ["adalomo", "lomo", "adamw", "adafactor"])
def test_restored_arrays_lie_where_they_belong_and_are_donated(optimizer, mesh, tmp_path):
    mesh = mesh and make_mesh(mesh)
    config = FinetuneConfig(optimizer=optimizer, batch_size=8, seq_len=16)
    of_batch = None if mesh is None else program_module.batch_sharding(mesh)
    training = make_training(config, tiny.TINY, of_batch, platform="cpu")
    abstract = abstract_arrays(training, mesh)
    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, abstract[0])
    params = jax.jit(training.make_params, out_shardings=shardings)()
    state = training.step.init(params, *training.args)
    with open_saver(tmp_path, ORIGIN, keep=1, after=0) as saver:
        saver.save(1, params, state, {}, None)
    restored = restore(tmp_path / "1", read_record(tmp_path / "1"), *abstract)
    assert same(restored, (params, state))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract)):
        due = want.sharding or SingleDeviceSharding(jax.devices()[0])
        assert got.sharding.is_equivalent_to(due, got.ndim) and got.committed == (mesh is not None or got.committed)

    put = lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
    compiled = training.step.jit.lower(*restored, *training.args).compile()
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(restored))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    jax.block_until_ready(compiled(*restored, *jax.tree.map(put, training.args)).params)
    assert all(x.is_deleted() for x in jax.tree.leaves(restored))


def test_a_resumed_run_makes_no_weights_of_its_own(killed, command, monkeypatch):
    def made(*_):
        raise AssertionError("made anew")

    monkeypatch.setattr(program_module, "_first_params", made)
    monkeypatch.setattr(FusedStep, "init", made)
    main([*command, "--output", str(killed), "--resume"])


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], ["--no-fused"]),
        (["--no-fused"], []),
        ([], ["--mesh", "fsdp=4,tensor=2"]),
        (["--mesh", "fsdp=4,tensor=2"], []),
    ],
    ids=lambda options: " ".join(options) or "fused",
)
def test_a_checkpoint_moves_between_steps_and_meshes(first, then, command, finished, tmp_path):
    if first:
        main([*command, *first, "--output", str(tmp_path / "run")])
    else:
        shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    main([*command, *then, "--output", str(tmp_path / "run"), "--resume", "--resume-step", "4"])
    losses = lambda folder: np.array([row.get("loss", row.get("eval_loss", 0)) for row in rows(folder)])
    assert len(losses(finished)) == 2 * STEPS + 1
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished), rtol=1e-5)


def test_sigterm_saves_and_stops(finished, command, tmp_path, capsys, monkeypatch):
    append, folder = run_module.append_row, tmp_path / "run"

    def terminated(path, row):
        append(path, row)
        if row.step == 3 and not hasattr(row, "eval_loss"):
            os.kill(os.getpid(), signal.SIGTERM)

    quiet = [*command, "--checkpoint-every", "100", "--output", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "append_row", terminated)
        said = refused(capsys, quiet, status=143)
    assert said == (
        "adalomo-jax: stopped after step 3, which is saved; to go on, give the same options with "
        f"--output {folder} --resume\n"
    )
    assert steps_in(folder) == [3] and not (folder / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    main([*quiet, "--resume"])
    assert weights(folder) == weights(finished) and rows(folder) == rows(finished)


def test_without_checkpoints(command, tmp_path):
    main([*command, "--output", str(tmp_path / "run"), "--checkpoint-every", "0", "--steps", "1"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_parameters_alone(finished):
    params, config = restore_params(finished / "checkpoints" / "6")
    exported = open_checkpoint(finished)
    assert config == exported.config == tiny.TINY
    assert same(params, load_params(exported.config, exported.source, "float32"))
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))), params)
    assert load_file(finished / "model.safetensors")["model.norm.weight"].shape == model.norm.weight.shape
    with pytest.raises(ValueError, match="there is no folder .*checkpoints/7"):
        restore_params(finished / "checkpoints" / "7")
