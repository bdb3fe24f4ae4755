"""Scaling laws: published figures reproduced, the closed form against a search, fits that recover what made the points."""

from __future__ import annotations

import json
import math
import random

import pytest

from hfpipe.artifact import write_record
from hfpipe.plan.devices import find_devices
from hfpipe.plan.fitting import Point, choose_free, fit
from hfpipe.plan.scaling import CHINCHILLA, Law, by_ratio
from hfpipe.progress import quantity

from .conftest import hfpipe


def scale(*arguments) -> dict:
    return json.loads(hfpipe("scale", *arguments, "--json").stdout)


def test_gopher_lacked_data():
    told = scale("--params", "280e9", "--tokens", "300e9")
    assert {name: round(term, 3) for name, term in told["loss_terms"].items()} == {
        "finite_model": 0.052,
        "finite_data": 0.251,
        "irreducible": 1.69,
    }
    assert told["loss"] == pytest.approx(sum(told["loss_terms"].values()))
    assert told["flops"] == pytest.approx(6 * 280e9 * 300e9)
    # Chinchilla, for the same cost, was the better one.
    assert scale("--params", "70B", "--tokens", "1.4T")["loss"] < told["loss"]


def test_the_best_division_is_where_no_other_is_better():
    for flops in (1e18, 1e21, 5.76e23):
        params, tokens = CHINCHILLA.best(flops)
        assert 6 * params * tokens == pytest.approx(flops)
        best = CHINCHILLA.loss(params, tokens)
        for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2):
            assert CHINCHILLA.loss(params * factor, tokens / factor) > best
    assert by_ratio(5.76e23) == pytest.approx((69.3e9, 1.386e12), rel=1e-2)  # Chinchilla's own budget


def test_any_one_figure_gives_the_rest():
    devices = ["--device", "h100x8", "--utilisation", "0.4", "--price", "2"]
    told = scale("--params", "1e9", *devices)
    assert (told["tokens"], told["flops"]) == (20e9, 6 * 1e9 * 20e9)
    assert told["hours"] == pytest.approx(1.2e20 / (989e12 * 0.4 * 8) / 3600)
    assert told["dollars"] == pytest.approx(told["hours"] * 8 * 2)
    for option, value in (("tokens", 20e9), ("flops", 1.2e20), ("hours", told["hours"]), ("dollars", told["dollars"])):
        again = scale(f"--{option}", repr(value), *devices)
        for name in ("params", "tokens", "flops", "hours", "dollars"):
            assert again[name] == pytest.approx(told[name]), (option, name)
    two = scale("--flops", "1.2e20", "--params", "2e9")
    assert two["tokens"] == pytest.approx(1e10)
    assert scale("--flops", "1.2e20", "--tokens", "1e10")["params"] == pytest.approx(2e9)


@pytest.mark.parametrize(
    ("given", "option", "value"), [("1e21", "--flops", "1e21"), ("24h", "--hours", "24"), ("$100", "--dollars", "100")]
)
def test_a_budget_is_of_flops_hours_or_money(given, option, value):
    device = ["--device", "h100"]
    assert scale("--budget", given, *device) == scale(option, value, *device)


def test_ten_times_the_budget():
    grown = scale("--flops", "1e20")["ten_times_the_budget"]
    assert grown["chinchilla"]["params"] == pytest.approx(10 ** (0.28 / 0.62))
    assert grown["kaplan"] == pytest.approx({"params": 10**0.73, "tokens": 10**0.27})
    for factors in grown.values():
        assert factors["params"] * factors["tokens"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Give one of --params, --tokens, --flops, --hours and --dollars"),
        (["--hours", "3"], "--hours needs --device"),
        (["--dollars", "3", "--device", "cpu"], "--dollars needs --price"),
        (["--hours", "3", "--flops", "1e18"], "both a budget"),
        (["--params", "1e9", "--tokens", "1e9", "--flops", "1e18"], "Leave one out"),
        (["--params", "0"], "--params 0: expected a finite number above 0"),
        (["--params", "seven"], "seven is not a number such as"),
        (["--budget", "24 days"], "24 days is not FLOPs such as 1e21, hours such as 24h or $100"),
        (["--params", "1e9", "--device", "h1000"], "Did you mean `h100`?"),
        (["--params", "1e9", "--device", "h100x0"], "expected one device or more"),
        (["--params", "1e9", "--device", "h100", "--utilisation", "40"], "40 is not a share"),
        (["--params", "1e9", "--device", "cpux2"], "this machine's CPU is one device"),
        (["--hours", "30m"], "30m is not a number such as"),  # of minutes it would be read
        (["--fit", "nowhere"], "--fit nowhere: no such folder"),
        (["--fit", "README.md"], "--fit README.md: a file. Give folders"),
    ],
)
def test_what_does_not_make_sense_is_told(arguments, expected):
    done = hfpipe("scale", *arguments, check=2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_human_output_has_a_sentence_for_each_figure():
    told = hfpipe("scale", "--params", "280e9", "--tokens", "300e9", "--device", "h100x8").stdout
    for words in ("0.052", "0.251", "more data helps most", "best by 20 to 1", "by Kaplan 2020", "8 x NVIDIA H100 SXM"):
        assert words in told
    assert "h100" not in hfpipe("scale", "--tokens", "1B").stdout


def test_units_may_be_small_where_things_are_counted():
    told = scale("--params", "125m", "--tokens", "1.3b")
    assert (told["params"], told["tokens"]) == (125e6, 1.3e9)


@pytest.mark.parametrize(
    ("number", "told"),
    [(999.4, "999"), (999.6, "1k"), (999_600, "1M"), (9.999e8, "1B"), (2.88e15, "2,880T"), (1.24e6, "1.24M")],
)
def test_the_unit_is_that_of_the_rounded_number(number, told):
    assert quantity(number) == told


def test_a_fit_finds_the_law_that_made_the_points():
    law = Law(1.5, 200, 300, 0.3, 0.25)
    grid = [(n, d) for n in (1e6, 4e6, 16e6, 64e6) for d in (2e7, 1e8, 5e8)]
    exact = fit([Point(n, d, law.loss(n, d), "") for n, d in grid])
    assert exact.free == ("E", "A", "B", "a", "b")
    for name in exact.free:
        assert getattr(exact.law, name) == pytest.approx(getattr(law, name), rel=0.01)
    rng = random.Random(0)
    noisy = fit([Point(n, d, law.loss(n, d) * (1 + rng.gauss(0, 0.003)), "") for n, d in grid])
    assert 0.001 < noisy.error < 0.006
    for name, (low, high) in noisy.intervals.items():
        assert low < getattr(law, name) < high
        assert high - low > (exact.intervals[name][1] - exact.intervals[name][0])


SIZES, LENGTHS = (1e6, 1e7, 1e8, 1e9), (1e8, 1e9, 1e10, 1e11)
GRIDS = {
    "all five": [(n, d) for n in SIZES for d in LENGTHS[:3]],
    "no exponents": [(n, d) for n in SIZES[:2] for d in LENGTHS[:2]],
    "one size": [(1e7, d) for d in LENGTHS],
    "one length": [(n, 1e9) for n in SIZES],
}


@pytest.mark.parametrize("noise", [0, 0.001])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_intervals_hold_the_estimate(grid, noise):
    for seed in range(3 if noise else 1):
        rng = random.Random(seed)
        points = [Point(n, d, CHINCHILLA.loss(n, d) * (1 + rng.gauss(0, noise)), "") for n, d in GRIDS[grid]]
        found = fit(points)
        assert set(found.intervals) == set(found.free)
        for name, (low, high) in found.intervals.items():
            value = getattr(found.law, name)
            assert low <= value <= high
            assert noise or high - low < 1e-3 * value  # nothing was left to chance
            assert not noise or high - low > 1e-4 * value


def test_a_fit_takes_no_more_constants_than_the_runs_tell_apart():
    def points(*pairs):
        return [Point(n, d, CHINCHILLA.loss(n, d), "") for n, d in pairs]

    few = fit(points((1e6, 1e8), (1e6, 1e9), (1e7, 1e8), (1e7, 1e9)))
    assert few.free == ("E", "A", "B")
    assert (few.law.a, few.law.b) == (0.34, 0.28)
    assert few.law.terms(1, 1)["finite_model"] == pytest.approx(406.4, rel=1e-3)
    one_size = fit(points(*((1e7, d) for d in (1e7, 1e8, 1e9, 1e10))))
    assert one_size.free == ("E", "B", "b")
    found = one_size.law.terms(1e7, 1e8)
    assert found["finite_model"] == 0
    assert found["irreducible"] == pytest.approx(1.69 + 406.4 / 1e7**0.34, rel=0.01)
    assert choose_free(points(*((n, 1e9) for n in (1e6, 1e7, 1e8, 1e9))))[0] == ("E", "A", "a")
    with pytest.raises(Exception, match="tell no law apart"):  # on one line, 20 tokens a parameter
        fit(points(*((n, 20 * n) for n in (1e6, 1e7, 1e8, 1e9, 1e10, 1e11))))


def test_a_fit_reads_finished_runs(micro_run, tmp_path):
    """The same run under four pairs of size and length: what is read is what its records say."""
    import shutil

    from hfpipe.artifact import read_record, write_record

    runs = []
    for layers in (2, 4):
        for tokens in (10**6, 10**8):
            folder = tmp_path / f"{layers}-{tokens}" / "pretrain"
            shutil.copytree(micro_run / "pretrain", folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
            record = read_record(folder / "stage.json")
            params = 768 * 64 + 64 + layers * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64)
            metrics = {**record["metrics"], "tokens": tokens}
            metrics["held_out_text"] = {"loss": CHINCHILLA.loss(params, tokens)}
            write_record(folder / "stage.json", {**record, "metrics": metrics})
            runs.append(folder.parent)
    told = scale("--fit", *runs, "--params", "1e6", "--tokens", "1e7")
    assert told["fit"]["fitted"] == ["E", "A", "B"]
    assert told["fit"]["law"]["B"] == pytest.approx(410.7, rel=1e-3)
    assert told["loss_terms"]["finite_data"] == pytest.approx(410.7 / 1e7**0.28, rel=1e-3)
    words = hfpipe("scale", "--fit", *runs).stdout
    assert "a and b are Chinchilla's" in words
    assert "tell no law apart" in hfpipe("scale", "--fit", micro_run, check=2).stderr
    assert "holds no finished pretrain stage" in hfpipe("scale", "--fit", tmp_path, check=2).stderr


def write_runs(folder, pairs, loss) -> list:
    """What is read of finished pretrainings of models of so many layers on so many tokens."""
    runs = []
    for layers, tokens in pairs:
        stage = folder / f"{layers}-{tokens:g}" / "pretrain"
        stage.mkdir(parents=True)
        config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
        (stage / "config.json").write_text(
            json.dumps({**config, "num_attention_heads": 2, "num_hidden_layers": layers})
        )
        metrics = {"tokens": tokens, "held_out_text": {"loss": loss(layers, tokens)}}
        write_record(stage / "stage.json", {"type": "pretrain", "metrics": metrics, "data": {}})
        runs.append(stage.parent)
    return runs


FOUR = (1e6, 1e7, 1e8, 1e9)
UNTOLD = {
    "one size": ([(2, d) for d in FOUR], lambda n, d: 2 + 300 / d**0.28, ["--params", "1M"]),
    "one length": ([(n, 1e8) for n in (1, 2, 4, 8)], lambda n, d: 2 + 1 / n**0.3, ["--tokens", "1M"]),
    "longer is no better": (
        [(n, d) for n in (1, 2, 4) for d in FOUR],
        lambda n, d: 2 + 1 / n**0.3 + d / 1e11,
        ["--params", "1M", "--tokens", "10M"],
    ),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_runs_that_do_not_tell_the_best_division(case, tmp_path):
    pairs, loss, asked = UNTOLD[case]
    runs = write_runs(tmp_path, pairs, loss)
    (tmp_path / "notes.txt").write_text("runs/* names files too")
    told = scale("--fit", tmp_path / "notes.txt", *runs, *asked)
    assert 0 in (told["law"]["A"], told["law"]["B"])
    assert (told["best"], told["ten_times_the_budget"]["chinchilla"]) == (None, None)
    assert told["loss"] > 2
    words = hfpipe("scale", "--fit", *runs, *asked).stdout
    assert "do not tell the best division" in words
    assert "helps most" not in words


def test_devices_are_sourced():
    from hfpipe.plan.devices import table

    assert len(table()) >= 11
    for key, raw in table().items():
        assert raw["source"], key
        assert raw["source"].startswith("https://"), key
        assert (raw["price"] is None) == (raw["price_source"] is None) == (raw["price_date"] is None), key
        assert raw["fp32"] < (raw["bf16"] or raw["fp16"]), key
        assert find_devices(f"{key}x2").count == 2
    eight = find_devices("h100x8")
    assert eight.rate("bf16") == pytest.approx(989e12 * 8 * 0.35)
    assert eight.cost(3600) == pytest.approx(8 * 3.99)
    assert find_devices("t4").rate("bf16") == find_devices("t4").rate("fp32")  # it has no bf16
    assert find_devices("mi300x").key == "mi300x"
    cpu = find_devices("cpu")
    assert cpu.price is None
    assert 0.01 < cpu.fp32 < 100
    assert math.isfinite(cpu.memory)
