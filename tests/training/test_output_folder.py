"""One run at a time writes to an output folder, and the folder is not read as text to train on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adalomo_jax.inputs import InputError
from adalomo_jax.run_files import LOCK, is_of_run
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.output_folder import claimed, output_folder


def folder_of(path, **options):
    return output_folder(FinetuneConfig(output=Path(path), **options))


def test_a_second_run_is_told_of_the_first(tmp_path):
    folder = tmp_path / "a" / "run"
    code = f"""if True:
        from pathlib import Path
        from adalomo_jax.inputs import InputError
        from adalomo_jax.training.output_folder import claimed
        try:
            with claimed(Path({str(folder)!r})):
                print("mine")
        except InputError as error:
            print(error)"""
    second = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    with claimed(folder):
        said = second()
    assert said == (
        f"--output {folder}: another run is writing there, as process {os.getpid()}; wait for its end, or name another "
        "folder\n"
    )
    assert not (tmp_path / "a").exists()  # nothing was written into it
    assert second() == "mine\n"


def test_a_lock_that_a_kill_has_left_is_taken_over(tmp_path):
    (tmp_path / LOCK).write_text("1")
    with claimed(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_left_if_it_holds_something(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of("~/run") == tmp_path / "run"
    with pytest.raises(InputError, match="nobody-of-this-name"):
        folder_of("~nobody-of-this-name/run")


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "hdfs://host/run", "az:/x", "file:///x"])
def test_addresses_are_refused(address):
    with pytest.raises(InputError, match=r"is an address of \w+:// storage, which is not written to"):
        folder_of(address)


def test_folders_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "in the way" / "summary.json").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("circle", "file", "dangling", "in the way", "y" * 300):
        with pytest.raises(InputError, match="--output"):
            folder_of(tmp_path / name, resume=True)
    with (
        pytest.raises(InputError, match="cannot be written to: File name too long"),
        claimed(tmp_path / "x" / ("y" * 300)),
    ):
        pass
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match=r"name_\\udcff has bytes in its name that are not UTF-8"):
        folder_of(tmp_path / "name_\udcff")


def test_a_run_is_known_by_its_files(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert not is_of_run(tmp_path)  # it may be somebody's data
    (tmp_path / "config.json").touch()
    assert is_of_run(tmp_path)
