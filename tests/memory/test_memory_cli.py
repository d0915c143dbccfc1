"""The command ``memory`` prints and draws its figures, and refuses unusable input."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import re
import sys
from typing import get_args, get_type_hints

import jax
import pytest
from tiers import slow

import adalomo_jax.commands.memory as fit
from adalomo_jax.cli import main
from adalomo_jax.commands.memory_options import MemoryConfig
from adalomo_jax.inputs import AXES
from adalomo_jax.memory import TARGETS, Usage
from adalomo_jax.models import PRESETS
from adalomo_jax.models.sharding import AXES as MESH_AXES
from adalomo_jax.pretrained.by_name import find_model
from adalomo_jax.pretrained.names import param_shapes
from adalomo_jax.rules import HELP
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.program import build_program

pytestmark = pytest.mark.uncached
KEYS = "params_bytes state_bytes argument_bytes alias_bytes temp_bytes peak_bytes host_bytes limit_bytes".split()
KEYS += ["fits", "compile_seconds", "name", "optimizer", "fused", "target", "estimated"]
SMALL = ["--model", "tiny", "--device", "cpu", "--seq-len", "16"]
SIZES = dict(model_type="llama", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, max_position_embeddings=32, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], **sizes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def json_rows(capsys, *options):
    main(["memory", *SMALL, *options, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def made_up(config, model, target, step):
    """A usage without a compiler; the unfused step is refused."""
    refused = not step.fused
    size = None if refused else 10**9
    return Usage(
        params_bytes=10 * 10**9,
        state_bytes=10**7,
        gradient_bytes=2 * 10**8,
        saved_bytes=3 * 10**8,
        argument_bytes=size,
        alias_bytes=size,
        output_bytes=size,
        temp_bytes=size,
        peak_bytes=20 * 10**9 if refused else 12 * 10**9,
        host_bytes=5 * 10**8,
        limit_bytes=16 * 10**9,
        compile_seconds=1.5,
        estimated=config.estimate,
        refused=refused,
    )


@pytest.mark.parametrize("how", [slow(["--estimate"]), slow([])], ids=" ".join)
def test_json_is_an_object_for_each_row_and_nothing_else(how, capsys, tmp_path):
    """In the fast tier, the tests below compile the rows, one at a time."""
    rows = json_rows(capsys, "--compare", *how)
    assert [row["name"] for row in rows] == [
        "adalomo, fused",
        "adalomo, unfused",
        "adafactor (optax, float32 moments), unfused",
        "adamw (optax, float32 moments), unfused",
        "lomo, fused",
    ]
    assert all(sorted(row) == sorted(KEYS) for row in rows)
    assert {row["estimated"] for row in rows} == {bool(how)}
    assert all(row["fits"] and row["peak_bytes"] >= row["params_bytes"] > 0 for row in rows)
    by_name = {row["name"]: row for row in rows}
    params = by_name["lomo, fused"]["params_bytes"]
    assert by_name["adamw (optax, float32 moments), unfused"]["state_bytes"] >= 2 * 2 * params
    assert by_name["lomo, fused"]["state_bytes"] < by_name["adalomo, fused"]["state_bytes"] < params
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_is_the_step_that_finetune_runs(capsys):
    """The figure in finetune's report comes from the same program."""
    (row,) = json_rows(capsys, "--dtype", "float32", "--batch-size", "4", "--optimizer", "lomo", "--microbatches", "2")
    config = FinetuneConfig(model="tiny", batch_size=4, seq_len=16, optimizer="lomo", microbatches=2, steps=600)
    program = build_program(config, find_model("tiny"))
    assert row["peak_bytes"] == program.compiled_bytes


def test_a_table_and_a_picture(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(fit, "usage_of", made_up)
    main(["memory", "--compare"])
    text = capsys.readouterr().out
    assert "llama-2-7b, 1 x 2048, bfloat16, on tpu-v5e" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert {name: (fused, unfused, lomo) for name, fused, unfused, _, _, lomo in lines} == {
        "parameters": ("10.00 GB",) * 3,
        "state": ("10.00 MB",) * 3,
        "gradients alive": ("200.00 MB",) * 3,
        "saved layer inputs": ("300.00 MB",) * 3,
        "other temporaries": ("1.49 GB", "9.49 GB", "1.49 GB"),
        "total": ("12.00 GB", "20.00 GB", "12.00 GB"),
        "the chip's limit": ("16.00 GB",) * 3,
        "fits": ("yes", "refused", "yes"),
        "to spare": ("4.00 GB", "0 B", "4.00 GB"),
        "over the limit": ("0 B", "4.00 GB", "0 B"),
        "in the host's memory": ("500.00 MB",) * 3,
    }
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "drawn to memory.png" in text


def test_a_narrow_terminal_has_room_for_all_figures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(fit, "usage_of", made_up)
    main(["memory", "--compare"])
    assert "…" not in capsys.readouterr().out


def test_weights_in_one_byte(capsys):
    """A byte for each weight of the layers' matrices, and two for the scale of each of their columns."""
    (row,) = json_rows(capsys, "--weights", "int8", "--estimate")
    shapes = [x.shape for x in jax.tree.leaves(param_shapes(PRESETS["tiny"]))]
    of_shape = lambda s: s[0] * s[2] * (s[1] + 2) if len(s) == 3 else 2 * math.prod(s)  # all are shorter than a block
    assert row["params_bytes"] == sum(map(of_shape, shapes))


def test_what_was_refused_is_null_in_json(capsys, monkeypatch):
    monkeypatch.setattr(fit, "usage_of", made_up)
    (row,) = json_rows(capsys, "--no-fused")
    assert row["argument_bytes"] is row["alias_bytes"] is row["temp_bytes"] is None
    assert not row["fits"] and row["peak_bytes"] == 20 * 10**9


def test_an_estimate_says_so_and_needs_no_compiler(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    (row,) = json_rows(capsys, "--device", "tpu-v5e", "--estimate")
    assert row["estimated"] and row["limit_bytes"] == TARGETS["tpu-v5e"].limit_bytes
    monkeypatch.setattr(fit, "usage_of", made_up)
    main(["memory", *SMALL, "--device", "tpu-v5e", "--estimate"])
    assert "lower bound, not compiled: tiny, 1 x 16" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mesh_of_this_machines_devices(capsys):
    (one,) = json_rows(capsys, "--batch-size", "4", "--estimate")
    (row,) = json_rows(capsys, "--batch-size", "4", "--chips", "8", "--shard", "fsdp=4,tensor=2")
    norms = 5 * 16 * 2
    assert row["params_bytes"] == (one["params_bytes"] - norms) // 8 + norms
    assert row["limit_bytes"] == one["limit_bytes"] // 8


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["params", "activations"])
def test_offloaded(capsys, offload):
    (all_on_chip,), (row,) = (json_rows(capsys, *more) for more in (["--estimate"], ["--offload", offload]))
    norms_and_ends = 2 * (5 * 16 + 2 * 256 * 16)
    expected = norms_and_ends if offload == "params" else all_on_chip["params_bytes"]
    assert row["params_bytes"] == expected and row["alias_bytes"] >= all_on_chip["params_bytes"]


def test_a_hugging_face_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    main(["memory", "--model", "config.json", "--device", "cpu", "--seq-len", "64", "--estimate", "--json"])
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    weights = 64 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert row["params_bytes"] == 2 * weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model llama-2-7", "did you mean llama-2-7b? presets: tiny,"),
        ("--model llama-2-7", "the path of a config.json, or owner/model on the hub"),
        ("--model missing.json", "--model missing.json cannot be read: "),
        ("--model broken.json", "--model broken.json cannot be read: Expecting"),
        ("--model gpt2.json", "--model gpt2.json: model_type must be one of llama"),
        ("--model list.json", "--model list.json must hold a JSON object, got list"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        (
            "--batch-size 4 --microbatches 3",
            "--microbatches must be at least 1 and divide the 4 of --batch-size",
        ),
        ("--seq-len 1", "--seq-len must be at least 2"),
        ("--chips 0", "--chips must be at least 1"),
        ("--chips 4", "--chips 4 must be the product of the sizes in --shard, which are none"),
        ("--chips 8 --shard fsdp=2,tensor=2", "must be the product of the sizes in --shard, which are 2 x 2"),
        ("--shard pipe=1", "--shard takes each of data, fsdp, tensor once, as axis=size"),
        ("--chips 4 --shard fsdp=2,fsdp=2", "--shard takes each of data, fsdp, tensor once"),
        ("--chips 2 --shard fsdp", "got 'fsdp'"),
        ("--chips 2 --shard fsdp=x", "got 'fsdp=x'"),
        ("--chips 2 --shard fsdp=2", "--batch-size 1 must be a multiple of 2, the product of data and fsdp"),
        ("--chips 2 --shard tensor=2 --estimate", "--estimate works for one chip only"),
        ("--offload params --no-fused", "--offload needs the fused step; leave --no-fused out"),
        ("--offload params --estimate", "--estimate does not know --offload"),
        ("--output folder", "--output folder is a folder, not a file"),
        ("--output nowhere/memory.png", "nowhere is no folder that may be written to"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit, "usage_of", lambda *args: 1 / 0)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "gpt2.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["memory", *options.split()])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert captured.err.startswith("adalomo-jax: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_axes_that_a_torus_has_no_room_for_are_refused(capsys, monkeypatch):
    def no_assignment(sizes, devices):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 2")

    monkeypatch.setattr(fit, "devices_of", lambda target, chips: [None] * chips)
    monkeypatch.setattr(fit, "make_mesh", no_assignment)
    with pytest.raises(SystemExit):
        main("memory --model tiny --device tpu-v5p --chips 512 --shard fsdp=128,tensor=4 --batch-size 128".split())
    assert "--shard fsdp=128,tensor=4 cannot be laid on 512 chips, a torus of 8 x 8 x 8" in capsys.readouterr().err


def test_good_input_does_compile(monkeypatch):
    monkeypatch.setattr(fit, "usage_of", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["memory"])


@pytest.mark.parametrize(("device", "extra"), [("tpu-v5e", "tpu-aot"), ("h100", "cuda-aot")])
def test_a_missing_plugin_is_one_line_that_names_the_extra(device, extra, capsys, monkeypatch):
    find, plugins = importlib.util.find_spec, ("libtpu", "jax_plugins")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith(plugins) else find(name, *rest)
    )
    with pytest.raises(SystemExit) as stopped:
        main(["memory", "--device", device])
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert printed.err.count("\n") == 1 and f"pip install 'adalomo-jax[{extra}]'" in printed.err


def documentation():
    """The text below each field of MemoryConfig."""
    (definition,) = ast.parse(inspect.getsource(MemoryConfig)).body
    assert isinstance(definition, ast.ClassDef)
    pairs = zip(definition.body, definition.body[1:], strict=False)
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def test_help_explains_every_option_and_names_every_device_and_preset(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["memory", "--help"])
    text = " ".join(re.sub("[│|]", "", capsys.readouterr().out).split())
    texts = documentation() | {"optimizer": HELP}
    for field in dataclasses.fields(MemoryConfig):
        assert f" --{field.name.replace('_', '-')} " in text.replace(",", " ")
        assert " ".join(texts[field.name].split()) in text
    assert all(name in text for name in (*PRESETS, *TARGETS))
    assert "None" not in text and "(default: )" not in text


def test_the_options_name_what_there_is():
    assert list(get_args(get_type_hints(MemoryConfig)["device"])) == list(TARGETS)
    assert AXES == MESH_AXES
