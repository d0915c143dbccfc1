"""A corpus is read from files, folders and data sets; what cannot be read is named or refused."""

import gzip
import json
import os
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
from toy_tokenizer import ToyTokenizer

from adalomo_jax.inputs import InputError
from adalomo_jax.text.corpus import read_corpus, standard_library
from adalomo_jax.text.data import load_data
from adalomo_jax.text.documents import Broken, Document, PassedOver


def read(*paths):
    return read_corpus(paths, ToyTokenizer())


def texts(documents):
    return [document.text for document in documents]


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def saved(tmp_path):
    """Saves a data set, or a dictionary of data sets, under a name."""

    def save(name, content):
        made = (
            datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split, columns in content.items()})
            if isinstance(next(iter(content.values())), dict)
            else datasets.Dataset.from_dict(content)
        )
        made.save_to_disk(str(tmp_path / name))
        return tmp_path / name

    return save


@pytest.mark.slow
def test_standard_library_is_real_code_without_tests():
    documents = standard_library()
    names = [document.name for document in documents]
    assert "argparse.py" in names
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)
    assert read_corpus(None, ToyTokenizer()).documents == documents


def test_folders_are_read_recursively_and_files_once(tmp_path):
    (tmp_path / "inner" / ".git").mkdir(parents=True)
    for name in ("b.txt", "inner/a.txt", ".hidden", "inner/.git/config"):
        (tmp_path / name).write_text(name)
    (tmp_path / "image").write_bytes(b"\x89PNG\0")
    (tmp_path / "none").touch()
    lines(tmp_path / "inner" / "c.jsonl", {"text": "c"}, {"text": "d"})
    corpus = read(tmp_path, tmp_path / "b.txt", tmp_path / "inner" / ".." / "b.txt")
    names = ["b.txt", "inner/a.txt"]
    assert corpus.documents == [
        *(Document(name, name) for name in names),
        *(Document(f"inner/c.jsonl:{i}", text) for i, text in enumerate("cd", 1)),
    ]
    assert corpus.broken == []
    assert corpus.passed_over == [PassedOver(f"{tmp_path}/image", "not text: it has zero bytes")]


def test_text_is_as_it_is_written_but_for_a_mark_of_utf_8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\xe2\x80\xa8two \n")
    assert texts(read(tmp_path / "a.txt").documents) == ["one\r\n\u2028two \n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSON", "a.JSONL", "a.ndjson"])
def test_json_lines_may_be_blank_or_end_like_on_windows(tmp_path, name):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n{"prompt": "c", "completion": "d"}')
    documents = read(tmp_path / name).documents
    assert documents == [Document(f"{name}:1", "a\u2028b"), Document(f"{name}:3", "cd", ((1, 2),))]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.b.NDJSON"])
def test_json_lines_in_a_folder_are_known_by_their_endings(tmp_path, name):
    lines(tmp_path / name, {"text": "one"}, {"text": "two"})
    assert read(tmp_path).documents == [Document(f"{name}:1", "one"), Document(f"{name}:2", "two")]


@pytest.mark.parametrize("name", ["settings.json", "settings.JSON", "jsonl"])
def test_json_in_a_folder_is_text(tmp_path, name):
    (tmp_path / name).write_text('{\n "a": 1\n}')
    assert texts(read(tmp_path).documents) == ['{\n "a": 1\n}']


def test_broken_records_of_all_files_are_named_with_their_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n\nno\n{"text": "\xff"}\n{"text": ""}\n{"text": "\0"}\n')
    lines(tmp_path / "c.jsonl", {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]})
    corpus = read(tmp_path)
    assert texts(corpus.documents) == ["a"]
    assert corpus.broken == [
        Broken(f"{tmp_path}/a.txt:2", "is not UTF-8"),
        Broken(f"{tmp_path}/b.jsonl:3", "is not JSON: Expecting value at character 1 of the line"),
        Broken(f"{tmp_path}/b.jsonl:4", "is not UTF-8 at byte 11 of the line"),
        Broken(f"{tmp_path}/b.jsonl:5", "text is empty"),
        Broken(f"{tmp_path}/b.jsonl:6", "is not JSON: Invalid control character at at character 11 of the line"),
        Broken(f"{tmp_path}/c.jsonl:1", "no such role:\ntool"),
    ]


def test_a_data_set_is_read_by_its_columns(saved):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    folder = saved("set", {"text": ["one", None, "two", ""], "messages": [None, chat, None, None], "id": [1, 2, 3, 4]})
    corpus = read(folder)
    assert texts(corpus.documents) == ["one", "user:a|assistant:b</s>|", "two"]
    assert [document.name for document in corpus.documents] == ["set:1", "set:2", "set:3"]
    assert corpus.evaluation == []
    assert corpus.broken == [Broken(f"{folder}: row 4", "text is empty")]


def test_a_data_set_that_was_saved_for_arrays_is_read_as_text(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).with_format("numpy").save_to_disk(str(tmp_path / "set"))
    assert texts(read(tmp_path / "set").documents) == ["a"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_data_set_may_say_what_to_evaluate_on(saved, split):
    pairs = {"prompt": ["a"], "completion": ["b"]}
    corpus = read(saved("set", {"train": pairs, split: {"text": ["c"]}, "unsupervised": {"text": ["d"]}}))
    assert corpus.documents == [Document("set/train:1", "ab", ((1, 2),))]
    assert corpus.evaluation == [Document(f"set/{split}:1", "c")]
    assert [item.place.rpartition("/set/")[2] for item in corpus.passed_over] == ["unsupervised"]


def test_a_data_set_is_evaluated_on_one_split(saved):
    splits = ("train", "test", "validation")
    assert texts(read(saved("set", {split: {"text": [split]} for split in splits})).evaluation) == ["validation"]


def test_a_missing_package_is_named_with_its_extra(saved, monkeypatch):
    folder = saved("set", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'adalomo-jax\[datasets\]'"):
        read(folder)


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        ({"words": ["a"]}, None, "must have the columns text, prompt and completion, or messages, got words"),
        ({"test": {"text": ["a"]}}, None, "must have the split train, got test"),
        ({"train": {"text": ["a"]}}, ("dataset_dict.json", "{}"), "names no splits"),
        ({"text": ["a"]}, ("data-00000-of-00001.arrow", "no"), "cannot be read by datasets"),
        ({"text": []}, None, "cannot be read by datasets"),
    ],
)
def test_a_data_set_that_cannot_be_used(saved, content, change, message):
    folder = saved("set", content)
    if change:
        (folder / change[0]).write_text(change[1])
    with pytest.raises(InputError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"text": ["a"]}, {"train": {"text": ["a"]}}])
def test_a_data_set_inside_a_folder_is_not_taken_for_text(saved, tmp_path, content):
    saved("set", content)
    with pytest.raises(InputError, match="give .*/set itself"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.JSONL.GZ", "a.ndjson.gz"])
def test_compressed_files_are_refused(tmp_path, name):
    gzipped, zipped, in_folder = tmp_path / "a.jsonl", tmp_path / "a.txt", tmp_path / "folder" / name
    in_folder.parent.mkdir()
    for path in (gzipped, in_folder):
        path.write_bytes(gzip.compress(b'{"text": "a"}'))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a", "text")
    for path in (gzipped, zipped, in_folder, in_folder.parent):
        with pytest.raises(InputError, match="is compressed: unpack it first"):
            read(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_what_of_a_folder_is_not_read_is_named_with_its_reason(tmp_path, encoding):
    wide, packed = tmp_path / "wide.txt", tmp_path / "packed.txt"
    wide.write_bytes("\ufeffGr\u00fc\u00dfe".encode(encoding))
    packed.write_bytes(gzip.compress(b"text"))
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"--data {tmp_path} holds no text files; 1 passed over (compressed: unpack it first): {packed}; "
        f"1 passed over (UTF-16: save it as UTF-8): {wide}"
    )
    (tmp_path / "a.txt").write_text("a")
    assert [Path(item.place).name for item in read(tmp_path).passed_over] == ["packed.txt", "wide.txt"]
    for paths in ([wide], [tmp_path, wide]):
        with pytest.raises(InputError, match="wide.txt is UTF-16: save it as UTF-8"):
            read(*paths)
    wide.rename(tmp_path / "wide.jsonl")
    with pytest.raises(InputError, match="wide.jsonl is UTF-16: save it as UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.jsonl", b"\n", "a.jsonl is empty"),
        ("a.bin", b"a\0", "a.bin is not text: it has zero bytes"),
        ("a.json", b'[\n{"text": "a"}]', "a.json is one JSON array: write one object a line"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="missing: no such file or folder"):
        read(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no text files"):
        read(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match="cannot read .*a.txt: Permission denied"):
        read(tmp_path / "a.txt")


def test_the_output_of_runs_is_no_text(tmp_path):
    """The output of an earlier run and that of this run are passed over, whatever they hold so far."""
    (tmp_path / "a.txt").write_text("text")
    for run, names in (("runs/old", ["metrics.jsonl", "config.json"]), ("runs/new", ["config.json"])):
        (tmp_path / run).mkdir(parents=True)
        for name in names:
            (tmp_path / run / name).write_text("{}")
    found = read_corpus([tmp_path], ToyTokenizer(), tmp_path / "runs" / "new")
    assert texts(found.documents) == ["text"]
    of_run = lambda name: PassedOver(str(tmp_path / "runs" / name), "the output of a run")
    assert found.passed_over == [of_run("new"), of_run("old")]
    with pytest.raises(InputError, match=r"holds no text files; 1 passed over \(the output of a run\)"):
        read(tmp_path / "runs" / "old")


def test_links_are_followed_and_what_is_no_file_is_named(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    (elsewhere / "deep").mkdir(parents=True)
    folder.mkdir()
    (elsewhere / "deep" / "b.txt").write_text("b")
    (folder / "a.txt").write_text("a")
    (folder / "same.txt").symlink_to(folder / "a.txt")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a cycle
    (folder / "nowhere").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe")
    found = read(folder)
    assert texts(found.documents) == ["a", "b"] and found.documents[1].name == "linked/deep/b.txt"
    assert found.passed_over == [
        PassedOver(str(folder / "nowhere"), "a broken link"),
        PassedOver(str(folder / "pipe"), "no regular file"),
    ]
    with pytest.raises(InputError, match="is a device or a pipe"):
        read(folder / "pipe")


def test_a_name_that_is_not_utf_8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"name_\xff.txt")
    path.write_text("text " * 100)
    assert load_data([path], ToyTokenizer(), seq_len=8).report.train_documents == 1
    with pytest.raises(InputError, match=r"--data .*missing_\\udcff: no such file"):
        read(tmp_path / os.fsdecode(b"missing_\xff"))


@pytest.mark.parametrize("splits", [None, [1], [["train"]], {}, "train"])
def test_splits_that_are_no_names_are_refused(splits, tmp_path):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(InputError, match="dataset_dict.json names no splits"):
        read(tmp_path)
