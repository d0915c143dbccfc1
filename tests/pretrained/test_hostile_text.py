"""Broken and hostile tokenizers, configurations, templates and rows are accepted, or refused in one line."""

import pytest
from hostile_text import KINDS, try_all

TAKEN = {
    "tokenizers": ("cut-off-0", "normalizer-many", "bpe-no-unk"),
    "configs": ("chat_template-12", "tokenizer_class-12"),
    "templates": (),
    "rows": ("deep-900", "weight-6"),
}
"""Odd but right cases: otherwise code that refuses everything would pass."""


def wrong(found):
    """Return the cases neither accepted nor refused in a short line that a terminal shows as text."""
    fine = lambda outcome: (
        outcome is None or (isinstance(outcome, str) and len(outcome) < 400 and outcome.isprintable())
    )
    return {case: outcome for case, outcome in found.items() if not fine(outcome)}


def test_a_sample_of_all_kinds(tmp_path):
    skipped = {("templates", name) for name in KINDS["templates"]} - {
        ("templates", name)
        for name in ("times", "ljust", "list", "output", "recursion", "large", "message", "escape-5")
    }
    cases = [(kind, name) for kind in KINDS for name in KINDS[kind]]
    chosen = [case for i, case in enumerate(cases) if case not in skipped and (i % 9 == 0 or case[0] == "templates")]
    chosen += [(kind, name) for kind, names in TAKEN.items() for name in names]
    found = try_all(list(dict.fromkeys(chosen)), tmp_path)
    assert not wrong(found)
    assert len(found) >= 50
    for kind, names in TAKEN.items():
        assert all(found[kind, name] is None for name in names)
    assert sum(isinstance(outcome, str) for outcome in found.values()) > 0.7 * len(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_kind(kind, tmp_path):
    found = try_all([(kind, name) for name in KINDS[kind]], tmp_path)
    assert not wrong(found)
    if kind == "templates":
        assert None not in found.values()


def test_what_is_wrong_is_seen():
    outcomes = {"a": {"wrong": "it hangs"}, "b": "two\nlines", "c": "a" * 400, "d": "\x1b[31m", "e": None, "f": "no"}
    assert set(wrong(outcomes)) == set("abcd")


def test_a_process_that_ends_or_hangs_is_seen(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for case in sys.argv[2:]:\n"
        "    kind, name = case.split('/')\n"
        "    time.sleep(100 * (name == 'hangs')), name == 'ends' and os._exit(3)\n"
        "    print(json.dumps([kind, name, None]), flush=True)\n"
    )
    monkeypatch.setattr("hostile_text.__file__", str(script))
    found = try_all([("k", "fine"), ("k", "hangs"), ("k", "ends"), ("k", "last")], tmp_path, seconds=0.5)
    assert found["k", "fine"] is found["k", "last"] is None
    assert found["k", "hangs"]["wrong"].startswith("it hangs") and found["k", "ends"]["wrong"].startswith("status 3")
