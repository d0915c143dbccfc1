"""A record becomes a document with the parts that are learned, or says why it is broken."""

import pytest
from toy_tokenizer import ToyTokenizer

from adalomo_jax.text.documents import Document, document_of, listed, parse_record

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def document(record):
    return document_of(record, "a", ToyTokenizer())


def test_all_of_a_text_is_learned():
    assert document({"text": " To be\n", "id": 3}) == Document("a", " To be\n", None)
    assert document({"text": "To be", "tools": "none of ours"}).unwritten == ()


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
        def chat(self, messages, *, tools=None):
            messages = list(messages)
            assert all(set(message) == {"role", "content"} for message in messages)
            return super().chat(messages)

    document_of({"messages": messages}, "a", Strict())


class WithTools(ToyTokenizer):
    """Accepts tools, but does not write ``tool_calls``."""

    def chat(self, messages, *, tools=None):
        assert tools in (None, [{"name": "look"}])
        return super().chat(messages)._replace(unwritten=("tool_calls",))


@pytest.mark.parametrize("tools", [[{"name": "look"}], '[{"name": "look"}]'], ids=["list", "json"])
def test_tools_are_given_to_the_template_and_what_it_does_not_write_is_known(tools):
    messages = [*CHAT, {"role": "assistant", "content": "so", "tool_calls": [{"name": "look"}]}]
    assert document_of({"messages": messages, "tools": tools}, "a", WithTools()).unwritten == ("tool_calls",)
    with pytest.raises(ValueError, match="message 3 has tool_calls alone, which the chat template does not write"):
        document_of({"messages": [*CHAT, messages[2] | {"content": None}]}, "a", WithTools())


def test_a_content_may_be_parts_of_text():
    parts = [{"type": "text", "text": "h", "image_url": None}, {"type": "text", "text": "i"}]
    assert document({"messages": [{"role": "user", "content": parts}, CHAT[1]]}) == document({"messages": CHAT})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CHAT, "tools": 3}, "tools must be a list of objects, got 3"),
        ({"messages": CHAT, "tools": "look"}, "tools must be a list of objects, or JSON of one, got other text"),
        ({"messages": CHAT, "tools": ["look"]}, "tools must be a list of objects, got ['look']"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 1: content must have parts of the",
        ),
        ({"a" * 10**6: 1}, "got 'aaaaa"),
        ({"a\x1b[31m\n": 1}, r"got 'a\x1b[31m\n'"),
        ({str(i): 1 for i in range(10**4)}, "and 9,994 more"),
        ({}, "must have one of text, prompt and completion, or messages, got no fields"),
        ({"question": "a", "answer": "b"}, "got answer, question"),
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
    assert reason in str(error.value) and len(str(error.value)) < 400


def test_a_template_that_writes_no_answer_is_found():
    class Silent(ToyTokenizer):
        def chat(self, messages, *, tools=None):
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
        (b'{"text": ' + b"1" * 5000 + b"}", "is JSON with a number of thousands of digits"),
    ],
)
def test_a_line_that_is_no_record_says_why(line, reason):
    with pytest.raises(ValueError) as error:
        parse_record(line)
    assert reason in str(error.value)


def test_names_that_are_not_utf_8_can_be_printed():
    assert listed(["caf\udce9.png"]) == "caf\\udce9.png"
    assert listed(["a\nb\x1b[31m.txt", "é"]) == "a\\nb\\x1b[31m.txt; é"
    assert len(listed(["a" * 10**6])) < 400
