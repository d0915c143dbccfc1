"""Any text from a disk, and any row that is not valid, is read, counted, or refused in one line."""

import gzip
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiers import always
from toy_tokenizer import ToyTokenizer

from adalomo_jax.inputs import InputError
from adalomo_jax.pretrained.tokenizer import ByteTokenizer
from adalomo_jax.text.data import load_data

GOOD = b'{"text": "a text that goes on and on"}\n' * 8
TURN = {"role": "user", "content": "x"}
VALUES = [
    None,
    True,
    1,
    1.5,
    -(10**400),
    "",
    " ",
    "x",
    [],
    ["x"],
    {},
    {"a": 1},
    "\ud800",
    "\0",
    [TURN],
    [[TURN]],
    [None],
]
FIELDS = ["text", "prompt", "completion", "messages", "tools", "weight"]
BYTES = {
    "empty": b"",
    "blank": b"\n \n\t\n",
    "zero bytes": b"\0" * 100,
    "latin-1": "größer\n".encode("latin-1") * 9,
    "UTF-16": "text that goes on".encode("utf-16") * 9,
    "UTF-32": "text that goes on".encode("utf-32") * 9,
    "mark of UTF-8": b"\xef\xbb\xbf" + GOOD,
    "mark alone": b"\xef\xbb\xbf",
    "gzip": gzip.compress(GOOD),
    "zip": b"PK\x03\x04" + GOOD,
    "carriage returns": GOOD.replace(b"\n", b"\r\n"),
    "only carriage returns": GOOD.replace(b"\n", b"\r"),
    "no newline": GOOD.rstrip(),
    "one array": b"[" + GOOD.replace(b"\n", b",") + b"{}]",
    "cut off": GOOD[:-9],
    "deep": b"[" * 100_000,
    "deep object": b'{"text":' * 50_000,
    "a number of many digits": b'{"text": 1' + b"0" * 5000 + b"}",
    "NaN": b'{"text": NaN}',
    "a name of 100 kB": b'{"' + b"x" * 10**5 + b'": 1}',
    "a value of 100 kB": b'{"text": 1, "messages": "' + b"x" * 10**5 + b'"}',
    "the same name twice": b'{"text": "a", "text": "b"}\n' * 9,
    "control characters": b'{"text": "\x1b[31m"}',
    "escapes": b'{"text": "\\ud800"}\n' * 3 + GOOD,
    "separators of lines": '{"text": "a\u2028b\u0085c and so on"}\n'.encode() * 9,
}


def rows() -> dict[str, bytes]:
    """Each field with each value, alone and beside the fields that it needs."""
    found = {}
    for (i, value), field in itertools.product(enumerate(VALUES), FIELDS):
        others = {"completion": "yes"} if field == "prompt" else {"prompt": "x"} if field == "completion" else {}
        others |= {"messages": [TURN, {"role": "assistant", "content": "y"}]} if field in ("tools", "weight") else {}
        for beside in ({}, others):
            record = beside | {field: value}
            found[f"{field} {i} {len(record)}"] = json.dumps(record).encode() + b"\n" + GOOD
    for key, (i, value) in itertools.product(("role", "content", "weight", "train"), enumerate(VALUES)):
        turn = {"role": "assistant", "content": "y"} | {key: value}
        found[f"turn's {key} {i}"] = json.dumps({"messages": [TURN, turn]}).encode() + b"\n" + GOOD
    return found


def outcome(path: Path, *, skip_bad: bool) -> str | None:
    """The line that refuses the file; None if it is read."""
    try:
        tokenizer = ToyTokenizer() if path.suffix == ".jsonl" and path.stat().st_size < 10_000 else ByteTokenizer()
        report = str(load_data([path], tokenizer, seq_len=8, skip_bad=skip_bad).report)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1500, str(error)[:2000]
        return str(error)
    assert all(line.isprintable() for line in report.split("\n")) and len(report) < 3000
    return None


@pytest.mark.parametrize("ending", always(["jsonl", "txt", "json", "ndjson", "JSONL", ""], ["jsonl", "txt"]))
@pytest.mark.parametrize("name", BYTES)
def test_bytes(name, ending, tmp_path):
    path = tmp_path / "folder" / f"data.{ending}"
    path.parent.mkdir()
    path.write_bytes(BYTES[name])
    for given, skip_bad in itertools.product((path, path.parent), (False, True)):
        outcome(given, skip_bad=skip_bad)


def test_rows(tmp_path):
    """Each stands alone among good rows. A file that is refused is read if bad rows are skipped."""
    refused = 0
    for i, (name, content) in enumerate(rows().items()):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(content)
        said = outcome(path, skip_bad=False)
        if said is not None:
            refused += 1
            assert f"{path}:1 " in said, (name, said)
            assert outcome(path, skip_bad=True) is None, name
    assert 150 < refused < len(rows()) - 10


def unreadable(folder: Path) -> None:
    (folder / "secret.txt").write_text("x")
    (folder / "secret.txt").chmod(0)


def socket_in(folder: Path) -> None:
    import socket

    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")


TREES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "hidden alone": lambda folder: (folder / ".hidden.txt").write_text("x"),
    "an empty folder": lambda folder: (folder / "a").mkdir(),
    "deep": lambda folder: (folder / "/".join("d" * 300)).mkdir(parents=True),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe.jsonl"),
    "a socket": socket_in,
    "a link to itself": lambda folder: (folder / "x.txt").symlink_to(folder / "x.txt"),
    "a link to its folder": lambda folder: (folder / "x").symlink_to(folder),
    "a link to a device": lambda folder: (folder / "x.txt").symlink_to("/dev/zero"),
    "a link to nothing": lambda folder: (folder / "x.txt").symlink_to("/nowhere/at/all"),
    "unreadable": unreadable,
    "a name with a newline": lambda folder: (folder / "a\nb.txt").write_bytes(b"\0"),
    "a name with an escape": lambda folder: (folder / "\x1b[31m.jsonl").write_bytes(b"broken\n"),
    "a name that is not UTF-8": lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl")).write_bytes(
        b"x"
    ),
    "a long name": lambda folder: (folder / ("n" * 250)).write_bytes(b"\0"),
    "a data set of no splits": lambda folder: (folder / "dataset_dict.json").write_text("[" * 100_000),
    "a data set that is none": lambda folder: [
        (folder / name).write_text("{}") for name in ("dataset_info.json", "state.json")
    ],
    "a data set within": lambda folder: [
        (folder / "in").mkdir(),
        (folder / "in" / "dataset_dict.json").write_text("{}"),
    ],
    "broken weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a case may change it
    folder = tmp_path / "folder"
    folder.mkdir()
    TREES[name](folder)
    for good, skip_bad in itertools.product((False, True), (False, True)):
        if good:
            (folder / "good.jsonl").write_bytes(GOOD)
        outcome(folder, skip_bad=skip_bad)
