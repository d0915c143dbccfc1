"""Records in the forms of other tools become the same documents as in ours."""

import pytest
from toy_tokenizer import ToyTokenizer

from adalomo_jax.text.documents import document_of
from adalomo_jax.text.records import columns_of, renamed

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
OURS = document_of({"messages": CHAT}, "x", ToyTokenizer())


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "id": 3},
        {"conversations": CHAT},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "input": None, "output": "4", "text": None},
        {"prompt": "2 + 2?", "prompt_id": "1", "messages": CHAT, "category": "sums"},  # HuggingFaceH4/no_robots
    ],
    ids=["ShareGPT", "ShareGPT's name", "Alpaca", "Alpaca without input", "no_robots"],
)
def test_is_the_same_chat(record):
    assert document_of(record, "x", ToyTokenizer()) == OURS


def test_alpaca_without_a_template_has_alpacas_own_prompt():
    record = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    document = document_of(record, "x", ToyTokenizer(special=False))
    assert document.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n"
        "### Response:\n4"
    )
    assert document.learned == ((len(document.text) - 1, len(document.text)),)
    short = document_of({"instruction": "Go.", "output": "ok"}, "x", ToyTokenizer(special=False)).text
    assert "describes a task. Write" in short and "### Input" not in short


def test_a_system_prompt_beside_sharegpts_turns_comes_first():
    class WithSystem(ToyTokenizer):
        def chat(self, messages, *, tools=None):
            first, *rest = messages
            assert first == {"role": "system", "content": "Be brief."}
            return super().chat(rest)

    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4", "weight": 1}]
    assert document_of({"system": "Be brief.", "conversations": turns}, "x", WithSystem()).text == OURS.text


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 of conversations must be from human, "),
        ({"conversations": ["x"]}, "turn 1 of conversations must be an object"),
        ({"conversations": "x"}, "conversations must be a list"),
        ({"instruction": 3, "output": "x"}, "instruction must be a string, got a number"),
        ({"text": "x", "messages": CHAT}, "must have one of text, .*, got messages, text"),
        ({"question": "x", "answer": "y"}, "must have one of text, .*, got answer, question"),
    ],
)
def test_what_has_no_form_is_refused(record, says):
    with pytest.raises(ValueError, match=says):
        document_of(record, "x", ToyTokenizer())


def test_columns_by_other_names():
    columns = {"prompt": "question", "completion": "answer"}
    record = {"question": "2 + 2?", "answer": "4", "text": "no"}
    document = document_of(renamed(record, columns), "x", ToyTokenizer())
    assert document == document_of({"prompt": "2 + 2?", "completion": "4"}, "x", ToyTokenizer())
    assert columns_of(["id", "question", "answer", "tools"], columns) == ["question", "answer", "tools"]
    assert columns_of(["id", "question"], columns) == []
    assert columns_of(["prompt", "prompt_id", "messages"], {}) == ["prompt", "messages"]
    assert columns_of(["prompt", "prompt_id"], {}) == []
    with pytest.raises(ValueError, match="must have the columns question, answer of --columns, lacks answer"):
        renamed({"question": "x"}, columns)
