"""The learning-rate range test suggests a good rate, and leaves its rows and a picture."""

import contextlib
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from one_program import draw_nothing

from adalomo_jax.cli import main
from adalomo_jax.commands.find_lr import ABOVE, BELOW, STEPS, Rate, smooth, suggest
from adalomo_jax.inputs import InputError
from adalomo_jax.models import PRESETS
from adalomo_jax.rules import RULES
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.schedule import make_range_schedule

RATES = np.geomspace(1e-5, 1.0, STEPS)


def rates_of(loss, noise=0.0):
    """A range test whose loss is a function of the rate's power of ten, from -5 to 0."""
    losses = loss(np.log10(RATES)) + noise * np.random.default_rng(0).normal(size=STEPS)
    smoothed = smooth(losses.tolist())
    return [Rate(i + 1, *row) for i, row in enumerate(zip(RATES.tolist(), losses.tolist(), smoothed))]


def valley(x):
    """A loss that falls fastest at 10**-3, by 2 nats in all, is smallest soon after 10**-2 and explodes above."""
    return 5 - 1 / (1 + np.exp(-5 * (x + 3))) * 2 + np.minimum(np.exp(6 * (x + 1.5)), 20)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_steepest_descent_is_found(noise):
    found = suggest(rates_of(valley, noise))
    assert 10**-3.4 < found.steepest < 10**-2.6
    assert 10**-3.4 < found.tenth < 10**-2.6
    assert found.rate == max(found)


def test_the_fall_after_a_jump_does_not_count():
    jump = lambda x: valley(x) + 50 * np.maximum(0, 1 - np.abs(x + 0.8) / 0.5)
    assert suggest(rates_of(jump)) == suggest(rates_of(lambda x: np.where(x < -1.3, valley(x), 60.0)))
    assert np.min(np.diff([rate.loss for rate in rates_of(jump)])) < np.min(np.diff(valley(np.log10(RATES))))


def test_losses_that_are_not_finite_are_left_out():
    rates = rates_of(valley)
    cut = [rate._replace(loss=math.nan, smoothed=math.nan) if rate.learning_rate > 0.1 else rate for rate in rates]
    assert suggest(cut) == suggest(rates)


@pytest.mark.parametrize("loss", [lambda x: 5 + (x + 5), lambda x: np.full_like(x, math.nan)])
def test_a_loss_that_never_falls_suggests_nothing(loss):
    with pytest.raises(InputError, match="must fall to show one"):
        suggest(rates_of(loss))


def test_rates_rise_by_the_same_factor_around_the_optimizer_s_own():
    schedule = make_range_schedule(FinetuneConfig(optimizer="lomo"), BELOW, ABOVE, STEPS)
    rates = np.asarray(schedule(np.arange(STEPS)))
    own = RULES["lomo"].random_rate
    np.testing.assert_allclose(rates, np.geomspace(BELOW * own, ABOVE * own, STEPS), rtol=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options for a run of a very small model."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"line {i} of a text that repeats itself\n" * 40)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], **sizes))
        draw_nothing(patch)
        yield ["--data", str(folder), "--batch-size", "4", "--seq-len", "32"]


def range_test(folder, *options):
    """The folder of a range test and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["finetune", "--find-lr", *options, "--output", str(folder)])
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def tested_and_printed(small, tmp_path_factory):
    return range_test(tmp_path_factory.mktemp("lr") / "test", *small)


@pytest.fixture(scope="module")
def tested(tested_and_printed):
    return tested_and_printed[0]


def rates_in(folder):
    return [json.loads(line) for line in (folder / "lr.jsonl").read_text().splitlines()]


def suggested(folder):
    return suggest([Rate._make(math.nan if v is None else v for v in row.values()) for row in rates_in(folder)]).rate


@pytest.mark.slow
def test_it_leaves_its_rows_and_a_picture_and_no_weights(tested):
    assert sorted(path.name for path in tested.iterdir()) == ["lr.jsonl", "lr.png"]
    assert (tested / "lr.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    rows = rates_in(tested)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0]["learning_rate"] == pytest.approx(BELOW * RULES["adalomo"].random_rate)


@pytest.mark.slow
def test_it_stops_where_the_loss_diverges(tested):
    rows = rates_in(tested)
    finite = [row["smoothed"] for row in rows if row["smoothed"] is not None]
    assert len(rows) < STEPS
    assert rows[-1]["loss"] is None or finite[-1] > 4 * min(finite)
    assert max(finite[:-1]) <= 4 * min(finite)


def check_printed(folder, printed):
    assert f"--learning-rate {suggested(folder):.1e}\n" in printed
    assert "the loss falls fastest at" in printed and "learning-rate range test" in printed


@pytest.mark.slow
def test_it_prints_the_rate_that_it_suggests(tested_and_printed):
    check_printed(*tested_and_printed)


@pytest.mark.slow
def test_it_prints_the_rate_that_it_suggests_for_another_optimizer(small, tmp_path):
    check_printed(*range_test(tmp_path / "test", *small, "--optimizer", "adamw"))


def trained(small, folder, rate):
    """The last evaluation loss of a run at this rate."""
    options = ["--steps", "40", "--learning-rate", str(rate), "--evaluate-every", "40"]
    main(["finetune", *small, *options, "--output", str(folder)])
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]


@pytest.mark.slow
def test_its_suggestion_trains_better_than_a_low_rate(small, tested, tmp_path):
    found, low = (trained(small, tmp_path / str(rate), rate) for rate in (suggested(tested), 1e-4))
    assert found < low - 1


@pytest.mark.slow
def test_its_suggestion_trains_as_well_as_the_built_in_rate(small, tested, tmp_path):
    rates = suggested(tested), RULES["adalomo"].random_rate
    found, built_in = (trained(small, tmp_path / str(rate), rate) for rate in rates)
    assert found < built_in + 0.2


@pytest.mark.slow
def test_a_second_test_in_the_same_folder_is_refused(small, tested, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--find-lr", *small, "--output", str(tested)])
    assert stopped.value.code == 2
    assert "holds a range test already (lr.jsonl, lr.png); name another folder" in capsys.readouterr().err
