"""Checkpoints restore what they saved, reveal damage, are kept by rule, and place arrays where they belong."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import SingleDeviceSharding
from tiers import slow

import adalomo_jax.training.checkpoints.record as record_module
import adalomo_jax.training.checkpoints.save as checkpoints
from adalomo_jax.inputs import InputError
from adalomo_jax.models import batch_sharding, make_mesh
from adalomo_jax.training.checkpoints.fingerprints import checksums
from adalomo_jax.training.checkpoints.record import FORMAT, Origin, Record, sealed, unsealed
from adalomo_jax.training.checkpoints.save import best_step, open_saver, read_record, restore
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.program import abstract_arrays, make_training

ORIGIN = Origin({"dtype": "float32"}, {"name": "none"}, "0")


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
    """Damages each file of the folder in turn: flips a bit, cuts the file, or removes it."""
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


@pytest.fixture
def outcomes(tmp_path):
    """The outcome of each damage in turn: it is seen, changes nothing, or is read as if nothing were wrong."""
    params, state = trees()
    with open_saver(tmp_path, ORIGIN, keep=1) as saver:
        saver.save(1, params, state, {"next_index": 1}, 2.5)

    def found():
        for _ in damages(tmp_path / "1"):
            try:
                record = read_record(tmp_path / "1")
                restored = restore(tmp_path / "1", record, shapes(params), shapes(state))
            except ValueError:
                yield "seen"
            else:
                intact = record._replace(checksums={}) == Record(1, {"next_index": 1}, 2.5, ORIGIN, {})
                yield "harmless" if intact and same(restored, (params, state)) else "wrong"

    return found()


def test_no_damage_goes_unseen(outcomes):
    found = list(outcomes)
    assert found.count("seen") >= 10 and "wrong" not in found


def test_without_checksums_some_does(outcomes, monkeypatch):
    """Orbax alone does not see all damage."""
    monkeypatch.setattr(checkpoints, "checksums", lambda arrays: {})
    assert "wrong" in outcomes


@pytest.mark.parametrize(("format", "is_read"), [(1, True), (FORMAT + 1, False)])
def test_earlier_formats_are_read(format, is_read, tmp_path, monkeypatch):

    def old(written):
        contents = sealed(written)["record"] | {"format": format}
        if format == 1:
            contents["origin"].pop("paths")
        return {"record": contents, "sha256": record_module._digest(contents)}

    monkeypatch.setattr(checkpoints, "sealed", old)
    params, state = trees(size=50)
    with open_saver(tmp_path, ORIGIN, keep=1) as saver:
        saver.save(1, params, state, {}, None)
    if is_read:
        assert read_record(tmp_path / "1").origin == ORIGIN
    else:
        with pytest.raises(ValueError, match=f"has the format {format}, and this version reads those up to"):
            read_record(tmp_path / "1")


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
    with open_saver(tmp_path, ORIGIN, keep=1) as saver:
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
    with open_saver(tmp_path, ORIGIN, keep=2) as saver:
        for step in (1, 2, 3):
            saver.save(step, params, state, {}, losses[step])
    checkpoints.remove_later(tmp_path, 3)
    with open_saver(tmp_path, ORIGIN, keep=2) as saver:
        for step in (4, 5, 6):
            saver.save(step, params, state, {}, losses[step])
    assert checkpoints.steps_in(tmp_path) == [2, 5, 6]
    assert best_step(tmp_path) == 2
    checkpoints.remove_later(tmp_path, 5)
    with open_saver(tmp_path, ORIGIN, keep=2):
        assert checkpoints.steps_in(tmp_path) == [2, 5]


@pytest.mark.parametrize("name", ["007", "٣", "7x", "-7", "7.orbax-checkpoint-tmp-1", ".removed"])
def test_only_names_that_are_given_to_checkpoints_are_steps(name, tmp_path):
    for folder in (name, "8"):
        (tmp_path / folder / "record").mkdir(parents=True)
    assert checkpoints.steps_in(tmp_path) == [8]


@pytest.mark.parametrize("are_later", [True, False])
def test_a_kill_while_some_are_removed_leaves_none_in_part(are_later, tmp_path, monkeypatch):
    params, state = trees(size=50)
    with open_saver(tmp_path, ORIGIN, keep=3) as saver:
        for step in (1, 2, 3):
            saver.save(step, params, state, {}, None)

    def killed(path):
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        checkpoints.remove_later(tmp_path, 1 if are_later else 3)
        with open_saver(tmp_path, ORIGIN, keep=1) as saver:
            saver.save(4, params, state, {}, None)
    assert checkpoints.steps_in(tmp_path) == ([1] if are_later else [4])
    assert not checkpoints.foreign_in(tmp_path)
    checkpoints.remove_later(tmp_path, 4)
    with open_saver(tmp_path, ORIGIN, keep=1) as saver:
        saver.save(5, params, state, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


@pytest.mark.parametrize("damage", ["{", ""])
def test_a_damaged_loss_is_named_by_its_step(damage, tmp_path):
    params, state = trees(size=50)
    with open_saver(tmp_path, ORIGIN, keep=3) as saver:
        for step, loss in {1: None, 2: 2.0, 3: 1.0}.items():
            saver.save(step, params, state, {}, loss)
    (tmp_path / "2" / "metrics" / "metrics").write_text(damage)
    with pytest.raises(InputError, match="checkpoint of step 2 in .* has a damaged evaluation loss.*; move .*/2 out"):
        checkpoints.remove_later(tmp_path, 3)
        with open_saver(tmp_path, ORIGIN, keep=3):
            pass
    (tmp_path / "2").rename(tmp_path / "away")
    checkpoints.remove_later(tmp_path, 3)
    with open_saver(tmp_path, ORIGIN, keep=3):
        assert checkpoints.steps_in(tmp_path) == [1, 3]


def test_a_full_disk_loses_no_older_checkpoint(tmp_path):
    small, large = trees(size=100), trees(size=500_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(InputError, match="could not be written: .*; the folder has those of the steps 1; ") as error:
        with open_saver(tmp_path, ORIGIN, keep=1) as saver:
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


MESH = {"fsdp": 4, "tensor": 2}
PAIRS = [(name, mesh) for name in ("adalomo", "adamw", "lomo", "adafactor") for mesh in (None, MESH)]


@pytest.mark.uncached
@pytest.mark.parametrize(("optimizer", "mesh"), [pair if pair == ("adalomo", None) else slow(*pair) for pair in PAIRS])
def test_restored_arrays_lie_where_they_belong_and_are_donated(optimizer, mesh, tmp_path):
    mesh = mesh and make_mesh(mesh)
    config = FinetuneConfig(optimizer=optimizer, batch_size=8, seq_len=16)
    of_batch = None if mesh is None else batch_sharding(mesh)
    training = make_training(config, tiny.TINY, of_batch, platform="cpu")
    abstract = abstract_arrays(training, mesh)
    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, abstract[0])
    params = jax.jit(training.make_params, out_shardings=shardings)()
    state = training.step.init(params, *training.args)
    with open_saver(tmp_path, ORIGIN, keep=1) as saver:
        saver.save(1, params, state, {}, None)
    restored = restore(tmp_path / "1", read_record(tmp_path / "1"), *abstract)
    assert same(restored, (params, state))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract)):
        due = want.sharding or SingleDeviceSharding(jax.devices()[0])
        assert got.sharding.is_equivalent_to(due, got.ndim) and (mesh is None or got.committed)

    put = lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
    compiled = training.step.jit.lower(*restored, *training.args).compile()
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(restored))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    jax.block_until_ready(compiled(*restored, *jax.tree.map(put, training.args)).params)
    assert all(x.is_deleted() for x in jax.tree.leaves(restored))


BREAKS = {
    "format": "2",
    "step": None,
    "batches": None,
    "batches.next_index": -1,
    "eval_loss": "low",
    "origin": [],
    "origin.options": None,
    "origin.data": 3,
    "origin.paths": "text.txt",
    "checksums": {"params": {"w": "1"}},
}


@pytest.mark.parametrize("field", BREAKS)
def test_a_record_that_is_sealed_and_wrong_is_named(field):
    good = sealed(Record(1, {"next_index": 1}, None, ORIGIN, {}))
    assert unsealed(good) == Record(1, {"next_index": 1}, None, ORIGIN, {})
    contents = json.loads(json.dumps(good["record"]))
    *outer, name = field.split(".")
    (contents[outer[0]] if outer else contents)[name] = BREAKS[field]
    with pytest.raises(ValueError, match=f"^its record: {field.split('.')[0]}.* got ") as error:
        unsealed({"record": contents, "sha256": record_module._digest(contents)})
    assert len(str(error.value).splitlines()) == 1
