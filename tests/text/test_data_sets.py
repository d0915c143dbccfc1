"""Data sets on a hub are read by their names: splits, subsets, columns, and errors on one line."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import serving
from toy_tokenizer import ToyTokenizer

from adalomo_jax.inputs import InputError
from adalomo_jax.text.corpus import read_corpus
from adalomo_jax.text.data_sets import Reading

datasets = pytest.importorskip("datasets")
NAME = "some/chats"


def chats(n, answer):
    messages = lambda i: [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"{answer}{i}"}]
    return [{"prompt": f"q{i}", "prompt_id": str(i), "messages": messages(i)} for i in range(n)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from huggingface_hub import constants

    root = tmp_path_factory.mktemp("hub")
    folder = root / "datasets" / NAME
    folder.mkdir(parents=True)
    for split, rows in {"train": chats(7, "a"), "test": chats(3, "b"), "extra": chats(2, "c")}.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    splits = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("train", "test", "extra"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    sums = root / "datasets" / "some" / "sums"
    for subset in ("main", "hard"):
        (sums / subset).mkdir(parents=True)
        (sums / subset / "train.jsonl").write_text('{"question": "1 + 1", "answer": "2", "text": 5}\n' * 4)
    names = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("main", "hard"))
    (sums / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    pickled = root / "datasets" / "some" / "pickled"
    pickled.mkdir()
    (pickled / "train.tar").write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patch, serving(root) as (hub, address):
        patch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        patch.setattr(datasets.config, "HF_ENDPOINT", address)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "data-cache")
        datasets.disable_progress_bars()
        yield SimpleNamespace(hub=hub, constants=constants)
        datasets.enable_progress_bars()


def read(name, before_fetch=None, **reading):
    return read_corpus([Path(name)], ToyTokenizer(), reading=Reading(**reading), before_fetch=before_fetch)


def test_what_it_takes_is_said_before_it_is_fetched_and_needs_room(served, monkeypatch):
    files = ["train.parquet", "test.parquet", "extra.parquet"]
    sizes = [(served.hub.root / "datasets" / NAME / file).stat().st_size for file in files]
    is_fetch = lambda line: line.startswith("GET") and "/resolve/" in line and line.endswith(".parquet")
    fetched = lambda: any(map(is_fetch, served.hub.asked))
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30 + sum(sizes)))
        with pytest.raises(InputError, match=f"{NAME} takes 0.00 GB, and .* has 1.07 GB free: make room"):
            read(NAME)
    assert not fetched()
    said = []
    read(NAME, lambda download: said.append((download.name, download.missing_bytes, fetched())))
    assert said == [(NAME, sum(sizes), False)] and fetched()
    read(NAME, said.append)
    assert len(said) == 1


def test_splits_to_train_and_to_evaluate_on_are_read(served):
    found = read(NAME)
    assert [document.text for document in found.documents] == [f"user:q{i}|assistant:a{i}</s>|" for i in range(7)]
    assert found.documents[0].name == f"{NAME}/train:1"
    assert [document.text for document in found.evaluation] == [f"user:q{i}|assistant:b{i}</s>|" for i in range(3)]
    assert [str(one.place) for one in found.passed_over] == [NAME] and not found.broken


def test_another_split_is_named(served):
    found = read(NAME, split="extra")
    assert len(found.documents) == 2 and len(found.evaluation) == 3
    with pytest.raises(InputError, match=f"{NAME} must have the split more, got .*train.*; name one with --split"):
        read(NAME, split="more")


def test_subsets_and_columns_are_named(served):
    with pytest.raises(InputError, match="main.*hard.*name one with --subset"):
        read("some/sums")
    with pytest.raises(InputError, match="must have the columns text, .*, got question, answer, .*--columns prompt="):
        read("some/sums", subset="hard", columns={"prompt": "query", "completion": "answer"})
    found = read("some/sums", subset="hard", columns={"prompt": "question", "completion": "answer"})
    assert [document.text for document in found.documents] == ["1 + 12"] * 4


def test_what_cannot_be_read_is_one_line(served):
    with pytest.raises(InputError, match="no file or folder some/typo, and no data set of that name"):
        read("some/typo")
    with pytest.raises(InputError, match="some/pickled is made of webdataset files; parquet, json, "):
        read("some/pickled")


def test_offline_it_comes_from_the_cache(served, monkeypatch):
    there = read(NAME)
    monkeypatch.setattr(served.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    served.hub.asked.clear()
    assert [d.text for d in read(NAME).documents] == [d.text for d in there.documents]
    assert not served.hub.asked


def test_folders_of_one_name_are_read_both(tmp_path):
    for i in (1, 2):
        rows = [{"text": f"{i} {n}"} for n in range(3)]
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / str(i) / "data")
    found = read_corpus([tmp_path / str(i) / "data" for i in (1, 2, 1)], ToyTokenizer())
    assert [document.text for document in found.documents] == [f"{i} {n}" for i in (1, 2) for n in range(3)]


def test_a_row_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "data")

    def damaged(self):
        raise OSError("not an\nArrow file")

    monkeypatch.setattr(datasets.Dataset, "__iter__", damaged)
    with pytest.raises(InputError, match="data cannot be read by datasets: not an Arrow file"):
        read_corpus([tmp_path / "data"], ToyTokenizer())
