"""Records: what becomes a document, what of it is learned, and what is broken."""

import pytest
from toy_tokenizer import ToyTokenizer

from adalomo_jax.finetune.documents import Document, document_of, listed, parse_record

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def document(record):
    return document_of(record, "a", ToyTokenizer())


def test_all_of_a_text_is_learned():
    assert document({"text": " To be\n", "id": 3}) == Document("a", " To be\n", None)


def test_the_completion_is_learned():
    made = document({"prompt": "1 + 1 = ", "completion": "2"})
    assert [made.text[start:end] for start, end in made.learned or ()] == ["2"]
    assert document({"prompt": "", "completion": "2"}).learned == ((0, 1),)


def test_what_the_assistant_says_is_learned():
    made = document({"messages": [*CHAT, *CHAT]})
    assert made.formatted
    assert made.text == "user:hi|assistant:ho</s>|" * 2
    assert [made.text[start:end] for start, end in made.learned or ()] == ["ho</s>"] * 2


def test_fields_that_are_none_are_absent():
    messages = [{**message, "tool_calls": None} for message in CHAT]
    assert document({"text": None, "messages": messages}) == document({"messages": CHAT})

    class Strict(ToyTokenizer):
        def chat(self, messages):
            assert all(set(message) == {"role", "content"} for message in messages)
            return super().chat(messages)

    document_of({"messages": messages}, "a", Strict())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "must have one of text, prompt and completion, or messages, got no fields"),
        ({"instruction": "a", "output": "b"}, "got instruction, output"),
        ({"prompt": "a", "id": 1}, "got prompt"),
        ({"text": "a", "messages": CHAT}, "got messages, text"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "got completion, prompt, text"),
        ({"text": 3}, "text must be a string, got a number"),
        ({"text": True}, "text must be a string, got true or false"),
        ({"text": " \n"}, "text is empty"),
        ({"prompt": CHAT, "completion": "a"}, "prompt must be a string, got a list"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"text": "a\ud800"}, r"has half a surrogate pair (\ud800)"),
        ({"messages": "hi"}, "messages must be a list, got a string"),
        ({"messages": ["hi"]}, "message 1 must be an object, got a string"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "message 2 must have a string content, got nothing"),
        ({"messages": [{"role": 1, "content": "a"}]}, "message 1 must have a string role, got a number"),
        ({"messages": []}, "must have a message of the role assistant"),
        ({"messages": CHAT[:1]}, "must have a message of the role assistant"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "must have a message of the role assistant"),
        ({"messages": [{"role": "tool", "content": "a"}, *CHAT]}, "no such role"),
    ],
)
def test_what_is_no_document_says_why(record, reason):
    with pytest.raises(ValueError) as error:
        document(record)
    assert reason in str(error.value)


def test_a_template_that_writes_no_answer_is_found():
    class Silent(ToyTokenizer):
        def chat(self, messages):
            return super().chat(messages)._replace(learned=())

    with pytest.raises(ValueError, match="has nothing that the assistant says"):
        document_of({"messages": CHAT}, "a", Silent())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'text': 3}", "is not JSON: Expecting property name enclosed in double quotes at character 2"),
        (b'{"text": "\xe9"}', "is not UTF-8 at byte 11"),
        (b'["text"]', "must be an object with text, prompt and completion, or messages, got a list"),
        (b"[" * 100_000, "too many brackets"),
        (b'{"text": "a"', "is not JSON"),
    ],
)
def test_a_line_that_is_no_record_says_why(line, reason):
    with pytest.raises(ValueError) as error:
        parse_record(line)
    assert reason in str(error.value)


def test_names_that_are_not_utf_8_can_be_printed():
    assert listed(["caf\udce9.png"]) == "caf\\udce9.png"
