"""Teaches a model to answer in a style of its own, from the 52 conversations in lighthouse.jsonl.

    python examples/instruction_tuning.py            # a tiny model that learns bytes: shows how it works
    python examples/instruction_tuning.py smollm2    # SmolLM2-135M-Instruct: minutes on a CPU, and worth reading

It prints the model's answers to questions that it has not seen, before and after. The model learns what the assistant
says.
"""

import json
import sys
import tempfile
from pathlib import Path

from adalomo_jax.commands.finetune import run as finetune
from adalomo_jax.commands.generate import run as generate
from adalomo_jax.commands.generate_options import GenerateConfig
from adalomo_jax.training.config import FinetuneConfig

CONVERSATIONS = Path(__file__).parent / "lighthouse.jsonl"
QUESTIONS = ["What is the capital of Italy?", "Why is the sky blue?", "How do I bake a cake?", "Who are you?"]


def answers(model, length):
    for question in QUESTIONS:
        print(f"\n> {question}")
        generate(GenerateConfig(model=model, prompt=question, chat=True, length=length, temperature=0.0))


def tiny(folder):
    """Trains on prompts and completions made from the conversations: a model that reads bytes has no chat template."""
    path = folder / "lighthouse.jsonl"
    with path.open("w") as file:
        for line in CONVERSATIONS.read_text().splitlines():
            question, answer = (message["content"] for message in json.loads(line)["messages"])
            file.write(json.dumps({"prompt": f"{question}\n", "completion": f"{answer}\n"}) + "\n")
    options = FinetuneConfig(
        data=(path,), steps=20, batch_size=4, seq_len=128, output=folder / "run", checkpoint_every=0
    )
    run = finetune(options)
    generate(GenerateConfig(model=str(run), prompt=f"{QUESTIONS[0]}\n", length=40))


def main(model="tiny"):
    folder = Path(tempfile.mkdtemp())
    if model == "tiny":
        return tiny(folder)
    print("before")
    answers(model, 60)
    options = FinetuneConfig(
        model=model,
        data=(CONVERSATIONS,),
        steps=12,
        batch_size=4,
        seq_len=128,
        learning_rate=5e-4,
        evaluate_every=6,
        evaluate_first=True,
        output=folder / "run",
    )
    run = finetune(options)
    print("after")
    answers(str(run), 60)


if __name__ == "__main__":
    main(*sys.argv[1:])
