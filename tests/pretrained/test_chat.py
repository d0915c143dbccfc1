"""A chat template yields a text and the assistant's part of it, or an error."""

import datetime

import pytest
from small_tokenizers import CHATML

from adalomo_jax.pretrained.chat import chat_prompt, chat_text, handed_over

LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
    "{{- '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
MARKED = """{% for message in messages %}
{% if message.role == "assistant" %}
A: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

{% else %}
{{ message.role }}: {{ message.content }}
{% endif %}
{% endfor %}
"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('only user and "
    "assistant\nroles') }}{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
    "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "user", "content": "Hi <b>"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye."},
]


def said(chat):
    return [chat.text[start:end] for start, end in chat.learned]


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, "<|im_end|>", ["Hello!<|im_end|>", "Bye.<|im_end|>"]),
        (CHATML, None, ["Hello!<|im_end|>\n", "Bye.<|im_end|>\n"]),
        (LLAMA3, "<|eot_id|>", ["Hello!<|eot_id|>", "Bye.<|eot_id|>"]),
        (MARKED, "</s>", ["Hello!</s>", "Bye.</s>"]),
        (MISTRAL, "</s>", [" Hello!</s>", " Bye.</s>"]),
    ],
    ids=["chatml", "chatml-without-eos", "llama-3", "generation", "mistral"],
)
def test_what_the_assistant_says_is_learned_and_nothing_else(template, eos, expected):
    chat = chat_text(template, CONVERSATION, bos_token="<s>", eos_token=eos)
    assert said(chat) == expected
    start, end = chat.learned[0]
    assert "Hi <b>" in chat.text[:start] and "And?" in chat.text[end:]


def test_the_text_is_that_of_the_template():
    assert chat_text(LLAMA3, CONVERSATION[:2], bos_token="<s>").text == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi <b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    )
    assert chat_text(MARKED, CONVERSATION[:2], eos_token="</s>").text == "user: Hi <b>\nA: Hello!</s>\n"


def test_a_conversation_without_the_assistant_teaches_nothing():
    assert chat_text(CHATML, CONVERSATION[:1]).learned == ()
    assert chat_text(MARKED, CONVERSATION[:1]).learned == ()


def test_an_answer_that_is_empty_is_its_end():
    messages = [CONVERSATION[0], {"role": "assistant", "content": ""}]
    assert said(chat_text(CHATML, messages, eos_token="<|im_end|>")) == ["<|im_end|>"]


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (MARKED, "</s>")], ids=["chatml", "generation"])
def test_a_turn_of_no_weight_is_read_and_not_learned(template, end, field):
    plain = chat_text(template, CONVERSATION, eos_token=end)
    first = [CONVERSATION[0], CONVERSATION[1] | field, CONVERSATION[2], CONVERSATION[3] | {"weight": 1, "train": True}]
    assert chat_text(template, first, eos_token=end) == (plain.text, plain.learned[1:], ())


def test_weights_are_told_apart_by_marks_or_refused():
    once = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    with pytest.raises(ValueError, match="marks 1 blocks of 2 messages"):
        chat_text(once, [*CONVERSATION[:3], CONVERSATION[3] | {"weight": 0}])
    with pytest.raises(ValueError, match="message 1 must have a weight of 0 or 1, .*, got 0.5"):
        chat_text(CHATML, [CONVERSATION[0], CONVERSATION[1] | {"weight": 0.5}])


def test_templates_do_not_see_what_is_for_training():
    chat = chat_text(
        "{{ messages[0] | tojson }}", [{"role": "user", "content": "a", "weight": 1, "train": False, "x": 1}]
    )
    assert chat.text == '{"role": "user", "content": "a", "x": 1}'


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " <b>"}]
    messages = [{"role": "user", "content": parts}, *CONVERSATION[1:]]
    assert chat_text(CHATML, messages) == chat_text(CHATML, CONVERSATION)


def test_tools_reach_the_template_or_are_said_to_be_unwritten():
    template = "{% for t in tools %}{{ t.name }} {% endfor %}" + CHATML
    tools = [{"name": "look"}, {"name": "seek"}]
    assert chat_text(template, CONVERSATION, tools=tools).text.startswith("look seek <|im_start|>")
    assert chat_text(template, CONVERSATION, tools=tools).unwritten == ()
    calls = [*CONVERSATION[:3], CONVERSATION[3] | {"tool_calls": [{"name": "look"}]}]
    assert chat_text(CHATML, calls, tools=tools).unwritten == ("tools", "tool_calls")


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama-3"])
def test_a_prompt_is_what_the_answer_continues(template):
    prompt = chat_prompt(template, CONVERSATION[:1], bos_token="<s>")
    chat = chat_text(template, CONVERSATION[:2], bos_token="<s>")
    assert chat.text.startswith(prompt) and len(prompt) == chat.learned[0][0]


def test_a_prompt_has_no_marks():
    prompt = chat_prompt(MARKED, CONVERSATION, eos_token="</s>")
    assert prompt == chat_text(MARKED, CONVERSATION, eos_token="</s>").text


def test_marks_are_found_inside_of_a_captured_block():
    template = "{% set all %}x {% generation %}{{ messages[0].content }}{% endgeneration %}!{% endset %}<{{ all }}>"
    chat = chat_text(template, CONVERSATION)
    assert chat.text == "<x Hi <b>!>" and said(chat) == ["Hi <b>"]


def test_the_template_has_what_transformers_gives_it():
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ tools is none }}{{ bos_token is defined }}"
    )
    assert chat_text(template, CONVERSATION).text == '{"role": "user", "content": "Hi <b>"}TrueFalse'


def test_a_text_to_learn_from_has_no_date_of_today():
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}"
    assert chat_text(template, CONVERSATION).text == "26 Jul 2024"
    assert chat_prompt(template, CONVERSATION) == str(datetime.date.today().year)


def test_a_template_cannot_leave_its_sandbox():
    template = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(ValueError, match="refuses the messages: access to attribute '__class__'"):
        chat_text(template, CONVERSATION)
    with pytest.raises(ValueError, match="refuses the messages"):
        chat_text("{{ messages.append(1) }}", CONVERSATION)


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        (CHATML, [], "at least one message"),
        (CHATML, [{"content": "a"}], "message 0 needs a role, such as 'user', got {'content': 'a'}"),
        (CHATML, ["a"], "message 0 needs a role"),
        (CHATML, [CONVERSATION[0], {"role": "user"}], "message 1 needs a content"),
        (CHATML, [{"role": "user", "content": [{"type": "image"}]}], "message 0: .* type 'text' alone, got 'image'"),
        (CHATML, [{"role": "user", "content": ["a"]}], "message 0: .* type 'text' alone, got 'a'"),
        (CHATML, [{"role": "user", "content": [{"type": "text"}]}], "message 0: a part .* must have a string text"),
        (CHATML, [{"role": "user", "content": "a", "x": {1}}], "messages must be of JSON's types: .* set"),
        (CHATML, [{"role": "user", "content": 3}], "refuses the messages: can only concatenate str"),
        (MISTRAL, [{"role": "system", "content": "a"}], "refuses the messages: only user and assistant roles$"),
        ("{% if %}", CONVERSATION, "refuses the messages: Expected an expression"),
        (FORGETS, CONVERSATION, "what the assistant says in message 1 cannot be told apart"),
        (
            "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
            CONVERSATION,
            "before its",
        ),
    ],
)
def test_what_is_refused(template, messages, error):
    with pytest.raises(ValueError, match=error) as raised:
        chat_text(template, messages)
    assert "\n" not in str(raised.value)


def test_what_a_marked_block_sets_stays_in_it():
    template = "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}"
    assert chat_text(template, CONVERSATION) == ("1False", ((0, 1),), ())


def test_messages_are_handed_over_in_their_order():
    messages = [1, 2, 3]
    given = handed_over(messages)
    assert next(given) == 1 and len(messages) == 2
    assert list(given) == [2, 3] and messages == []
