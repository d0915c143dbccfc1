"""Imports point down only: a lower layer imports no higher one."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "adalomo_jax"
LAYERS = [
    {"printable", "jax_versions"},
    {"barriers"},
    {"optimizers"},
    {"rules"},
    {"fused"},
    {"models"},
    {"nnx_graphs", "nnx_stacks"},
    {"linen", "nnx"},
    {"pretrained"},
    {"memory"},
    {"inputs", "run_files"},
    {"text"},
    {"training"},
    {"commands"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
"""The layers, bottom to top. The package itself offers `optimizers` and `fused`, and counts as `fused`."""
MODULES = {
    "optimizers": [
        *("choice", "arguments", "sums", "moments", "precision", "rounding", "layer_axes", "matrix_axes", "per_layer"),
        *("kept", "int8", "float24", "adalomo", "lomo", "optax_rules"),
    ],
    "fused": [
        *(
            "loss_scale",
            "plan.jaxpr",
            "plan.contents",
            "plan.dependence",
            "plan.terms",
            "plan.equation_signatures",
            "plan.folded_keys",
        ),
        *("plan.order", "plan.runs", "options", "offload", "buffers", "plan.periods", "plan.repeats", "sharding"),
        *("plan.chain", "plan.saving", "plan.reroll", "plan.homes", "plan.readers", "plan.differences", "plan.lists"),
        *("plan.leafwise", "plan.plan", "plan.planning", "plan.paths", "plan.call_signature", "plan.selection"),
        *("plan.checks", "plan.placed_tree", "plan.rolling", "plan.tracing"),
        *("plan.origins", "state", "convert", "run.cotangents", "run.in_place", "run.segment", "run.updater"),
        *(
            "run.layers",
            "run.layer_scan",
            "run.passes",
            "run.unfused",
            "run.evaluation",
            "result",
            "run.call",
            "step",
            "transform",
        ),
    ],
    "pretrained": [
        *("files", "json_files", "names", "source", "gguf_header", "gguf_file", "load", "checkpoint"),
        *("rust_errors", "template_process", "templates", "chat", "tokenizer", "tokenizer_json", "added_tokens"),
        *("tokenizer_files", "gguf_tokenizer", "export", "hub", "by_name"),
    ],
    "memory": [
        *("targets", "collectives", "usage", "compile", "estimate", "tables"),
    ],
    "text": ["records", "data_sets", "documents", "corpus", "split", "packing", "data", "batches"],
    "training": [
        *("config", "devices", "memory_use", "metrics", "schedule", "plots", "program", "fits"),
        "checkpoints.fingerprints",
        *(
            "checkpoints.record",
            "checkpoints.quiet",
            "checkpoints.save",
            "checkpoints.stopping",
            "loop",
            "summary",
            "tensorboard",
        ),
        *("checkpoints.resume", "output_folder"),
    ],
}
"""The modules within a layer, bottom to top."""


def level(part):
    return next(i for i, layer in enumerate(LAYERS) if (part or "fused") in layer)


def imported(path):
    """The names that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if node.module else [])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def violations(path, package=PACKAGE):
    parts = path.relative_to(package).with_suffix("").parts
    layer, module = parts[0], ".".join(parts[1:])
    if layer == "__init__":
        layer = ""
    order = MODULES.get(layer, [])
    for name in imported(path):
        if not name.startswith("adalomo_jax"):
            continue
        _, target, *rest = [*name.split("."), ""]
        target = target if any(target in names for names in LAYERS) else ""
        if level(target) > level(layer):
            yield name
        within = [known for known in order if target == layer and f"{'.'.join(rest)}.".startswith(f"{known}.")]
        if within and module in order and order.index(max(within, key=len)) >= order.index(module):
            yield name


FILES = sorted(PACKAGE.rglob("*.py"))


def test_imports_point_down():
    pointing_up = {str(path.relative_to(PACKAGE)): list(violations(path)) for path in FILES}
    assert len(pointing_up) > 50 and not any(pointing_up.values()), pointing_up


def test_imports_that_point_up_are_found(tmp_path):
    for file, line in (
        ("optimizers/moments.py", "from adalomo_jax.fused import fuse"),
        ("optimizers/moments.py", "import adalomo_jax.models.decoder"),
        ("optimizers/moments.py", "from adalomo_jax import fuse"),
        ("optimizers/rounding.py", "from adalomo_jax.optimizers.adalomo import adalomo"),
        ("fused/plan/plan.py", "def f():\n    from adalomo_jax.commands.finetune import run"),
        ("fused/plan/jaxpr.py", "from adalomo_jax.fused.transform import fuse"),
        ("models/decoder.py", "from adalomo_jax.cli import main"),
        ("pretrained/tokenizer.py", "from adalomo_jax.training.config import InputError"),
        ("pretrained/chat.py", "from adalomo_jax.pretrained.tokenizer import Encoded"),
        ("models/decoder.py", "from adalomo_jax.pretrained.tokenizer import Tokenizer"),
        ("pretrained/tokenizer.py", "from adalomo_jax.memory.usage import format_bytes"),
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line)
        assert list(violations(path, tmp_path)) != [], (file, line)


def test_every_module_of_the_ordered_layers_has_its_place():
    for layer, order in MODULES.items():
        files = (path.relative_to(PACKAGE / layer).with_suffix("") for path in (PACKAGE / layer).rglob("*.py"))
        assert sorted(".".join(file.parts) for file in files if file.stem != "__init__") == sorted(order)


def test_only_one_file_depends_on_the_version_of_jax():
    private = {path for path in FILES for name in imported(path) if name.startswith(("jax._src", "jax.extend"))}
    assert private == {PACKAGE / "jax_versions.py"}


def test_the_core_imports_without_flax():
    code = "import sys; from adalomo_jax import fuse; print({'flax', 'tyro', 'rich', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_optimizers_import_without_the_engine():
    code = (
        "import sys, adalomo_jax; first = set(sys.modules); adalomo_jax.fuse; "
        "print([name in modules for name in ('adalomo_jax.fused', 'jax.extend') for modules in (first, sys.modules)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, True, False, False]"
