"""The process in which templates run has bounds, and starts again after it ends."""

import importlib.util
import json
import os
import signal

import pytest

from adalomo_jax.pretrained import templates
from adalomo_jax.pretrained.templates import render

MESSAGES = [{"role": "user", "content": "Hi"}]
PLAIN = "{{ messages[0].content }}"


def rendered(template=PLAIN, **given):
    return render(template, MESSAGES, [(1, False)], given=given).text


def child():
    process = templates._process.child
    assert process is not None
    return process


def test_all_parts_are_rendered():
    template = "{{ messages|length }}{{ add_generation_prompt }}{{ x }}"
    parts = [(3, False), (1, True), (3, False), (0, False)]
    text, marked, others = render(template, MESSAGES * 3, parts, given={"x": "é\ud800"})
    assert (text, marked) == ("3Falseé\ud800", ()) and others == ("1Trueé\ud800", len(text), "0Falseé\ud800")
    assert render("{% for m in messages %}a{% endfor %}", MESSAGES * 3, parts, given={}) == ("aaa", (), (1, 3, 0))


@pytest.mark.parametrize(
    "content", ['a"\\\n\0', "\ud83d", "é" * (1 << 16) + '\U0001f600"' * 9, [{"a": None}, 1.5], None]
)
def test_messages_arrive_as_they_are(content):
    message = {"role": "user", "content": content, "other": {"name": content}}
    as_json = json.dumps(message, ensure_ascii=False)
    assert render("{{ messages[0]|tojson }}", iter([message]), [(1, False)], given={}).text == as_json


def test_templates_take_turns_in_one_process():
    first = rendered(), child().pid
    assert [rendered("a"), rendered(), rendered("a")] == ["a", "Hi", "a"]
    assert first == ("Hi", child().pid)


@pytest.mark.parametrize("template", ["{{ 'x' * 8000000000 }}", "{{ 1 / 0 }}", "{% if %}", "a" * 1_100_000])
def test_what_fails_leaves_the_process_as_it_is(template):
    rendered()
    pid = child().pid
    with pytest.raises(ValueError, match="chat template"):
        rendered(template)
    assert (rendered(), child().pid) == ("Hi", pid)


def test_a_process_that_was_ended_comes_again():
    rendered()
    before = child()
    os.kill(before.pid, signal.SIGKILL)
    before.wait()
    with pytest.raises(ValueError, match="ended the process that it ran in"):
        rendered()
    assert rendered() == "Hi" and child().pid != before.pid


def test_a_template_that_takes_too_long_is_refused_unseen_after_some_times(monkeypatch):
    templates._process.end()
    monkeypatch.setitem(templates.LIMITS, "seconds", 0.05)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for _ in range(templates._STRIKES):
        with pytest.raises(ValueError, match="breaks its bounds: it takes more than 0.05 seconds"):
            rendered(endless)
    with pytest.raises(ValueError, match="has broken its bounds 3 times: it is not tried again"):
        rendered(endless)
    assert rendered() == "Hi"
    templates._process.end()


def test_an_interrupted_answer_is_not_taken_for_the_next(monkeypatch):
    rendered()
    with monkeypatch.context() as patch:
        patch.setattr(templates._Process, "_received", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendered("late")
    assert templates._process.child is None
    assert rendered() == "Hi"


def interrupted(process):
    raise KeyboardInterrupt


def test_output_is_bounded_by_the_messages():
    long = [{"role": "user", "content": "a" * 3_000_000}]
    assert len(render(PLAIN, long, [(1, False)], given={}).text) == 3_000_000
    with pytest.raises(ValueError, match="it writes more than 1,00.,... characters of messages of"):
        rendered("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}")


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch):
    templates._process.end()

    def refused(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(templates.subprocess, "Popen", refused)
        with pytest.raises(ValueError, match="cannot be started: .* Resource temporarily unavailable"):
            rendered()
    assert rendered() == "Hi"


@pytest.mark.parametrize(
    ("module", "way_out"), [("jinja2", r"pip install 'adalomo-jax\[finetune\]'"), ("resource", "on Windows WSL")]
)
def test_without_what_it_needs_the_way_out_is_said(monkeypatch, module, way_out):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(templates.importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(ValueError, match=way_out):
        rendered()
