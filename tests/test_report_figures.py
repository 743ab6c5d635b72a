"""Figures of the report page: they show the numbers that are in the files, inside their frame."""

import json
import math
import re

import pytest
import torch

from hf_sl2o import Trajectory, fit_basis
from hf_sl2o.experiments.report import report_on
from hf_sl2o.experiments.report.axes import Axis, band, inside, limits_of, linear_ticks, log_ticks, thinned
from hf_sl2o.experiments.report.parts import Bars, Chart, Curve
from hf_sl2o.experiments.report.svg import axes_of, line_chart
from hf_sl2o.foundation.files import load_json, save_json

from .test_report import E2E, RESULTS, figure, page_of, texts

COMPARISONS = [path for path in sorted(RESULTS.glob("*.json")) if "steps_to" in load_json(path, dict)]


def drawn_values(chart, number):
    """(x, y) that the path of a curve shows, read back from its places by the labels of the ticks."""
    text = line_chart(chart)
    d = re.findall(r'<path class="l [^>]* d="([^"]*)"', text)[number]
    places = [tuple(map(float, place.split())) for place in re.split("[ML]", d) if place]

    def value(labels, place, log):
        (a, u), (b, v) = labels[0], labels[-1]
        u, v = (math.log(u), math.log(v)) if log else (u, v)
        found = u + (place - a) / (b - a) * (v - u)
        return math.exp(found) if log else found

    number = r"([-\d.,e]+)</text>"
    below = re.findall(rf'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">{number}', text)
    beside = re.findall(rf'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">{number}', text)
    xs = [(float(place), float(label.replace(",", ""))) for place, label in below]
    ys = [(float(place) - 3.5, float(label.replace(",", ""))) for place, label in beside]
    log = axes_of(chart)[1].log
    return [(value(xs, x, False), value(ys, y, log)) for x, y in places]


def test_a_curve_shows_the_losses_of_the_file():
    data, chart = load_json(E2E), figure(report_on(E2E), "Validation loss, 1,200 steps")
    arms = list(data["runs"])
    assert [curve.name for curve in chart.curves][:2] == ["SL2O", "AdamW†"] and len(chart.curves) == len(arms) == 8
    for number, arm in enumerate(arms):
        found, expected = drawn_values(chart, number), data["runs"][arm]["eval"]
        assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1.0), arm
        assert [y for _, y in found] == pytest.approx([y for _, y in expected], rel=3e-3), arm
    other = data["runs"]["subspace_adamw"]["eval"]
    assert [y for _, y in drawn_values(chart, 0)] != pytest.approx([y for _, y in other], rel=3e-3)


def test_the_band_is_the_range_over_seeds():
    data, chart = load_json(E2E), figure(report_on(E2E), "Validation loss, first 250")
    seeds = data["runs"]["sl2o"]["eval_per_seed"]
    columns = list(zip(*[[loss for _, loss in seed] for seed in seeds], strict=True))
    assert list(chart.curves[0].low) == [min(column) for column in columns] != list(chart.curves[0].high)
    assert list(chart.curves[0].high) == [max(column) for column in columns]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_steps_to_target_are_those_of_the_comparison(path):
    data = load_json(path)
    report = report_on(path)
    for key in ("steps_to", "steps_to_accuracy"):
        for name, level in data.get(key, {}).items():
            bars = figure(report, f"Steps to {name} (")
            shown = {(bar.name, bar.style): bar.value for bar in bars.bars}
            assert sorted(map(str, shown.values())) == sorted(map(str, level["steps"].values())), name


def test_steps_to_target_follow_the_curves(tmp_path):
    data = load_json(E2E)
    for seed in data["runs"]["sl2o"]["eval_per_seed"]:
        seed[2][1] = seed[1][1] = 9.0  # later than in the file
    save_json(tmp_path / "other.json", data)
    here, there = (figure(report_on(path), "Steps to adamw_w") for path in (E2E, tmp_path / "other.json"))
    assert here.bars[0].name == "SL2O" and here.bars[0].value < 25
    assert {bar.name: bar.value for bar in there.bars}["SL2O"] > 25


def test_steps_to_the_lowest_level_of_a_judged_comparison():
    path = RESULTS / "rule_default.json"
    report = report_on(path)
    for name, entry in load_json(path)["tasks"].items():
        level = min(entry["levels"].values(), key=lambda level: level["loss"])
        section = next(part for part in report.sections if part.title == f"tasks / {name}")
        (bars,) = [part for part in section.parts if isinstance(part, Bars)]
        assert sorted(str(bar.value) for bar in bars.bars) == sorted(map(str, level["steps"].values())), name
        assert f"{1.01 * level['loss']:.3f}"[:5] in bars.title


def test_what_stands_beside_explained_variance(tmp_path):
    trajectory = Trajectory(tmp_path / "trajectory")
    model = torch.nn.Linear(6, 5)
    for step in range(12):
        torch.nn.init.normal_(model.weight)
        trajectory.write(step, model.named_parameters())
    fit_basis(trajectory, 4, progress=False).save_pretrained(tmp_path / "basis")
    report = report_on(tmp_path / "basis")
    each, whole = figure(report, "Explained variance of each"), figure(report, "Explained variance, cumulated")
    # the eigenvalues of a centred walk are those of the path graph's inverse Laplacian
    walk = [math.sin(math.pi * k / 24) ** -2 for k in range(1, 12)]
    walk = [100 * value / sum(walk) for value in walk]
    assert [y for _, y in each.curves[1].points] == pytest.approx(walk[:4])
    assert whole.curves[1].points[-1] == (4, pytest.approx(sum(walk[:4])))
    shares = load_json(tmp_path / "basis" / "config.json")["provenance"]["explained_variance_ratio"]
    assert [y for _, y in each.curves[0].points] == pytest.approx([100 * share for share in shares])
    assert f"{sum(walk[:4]):.2f}" in texts(report)
    assert "random walk of 60 snapshots hold 99.1 %" in texts(report_on(E2E))  # where only the sum is known


# Numbers that are none


def test_a_diverged_arm_leaves_a_gap_and_is_said(tmp_path):
    data = load_json(E2E)
    run = data["runs"]["adamw"]
    for seed in run["eval_per_seed"]:
        seed[-1][1] = math.nan
        seed[5][1] = math.inf
        seed[8][1] = None
    run["train_loss"][3][1] = 1e30  # finite, and far above the frame
    (tmp_path / "diverged.json").write_text(json.dumps(data))
    report = report_on(tmp_path / "diverged.json")
    text = page_of(tmp_path / "diverged.json", tmp_path)
    drawing = "".join(re.findall(r' d="([^"]*)"', text))
    assert "not finite" in text and not re.search("nan|inf|None", drawing, flags=re.IGNORECASE)
    chart = figure(report, "Validation loss, 1,200")
    line = next(i for i, curve in enumerate(chart.curves) if curve.name == "AdamW")
    paths = re.findall(r'<path class="l [^>]* d="([^"]*)"', line_chart(chart))
    assert paths[line].count("M") == 3 and paths[0].count("M") == 1
    assert "leaves the frame" in figure(report, "Training loss, 1,200").note
    assert all(0 <= float(y) <= 250 for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", drawing))


# Mathematics


def test_what_of_a_line_is_inside():
    xs = torch.linspace(0, 20, 41).tolist()
    line = [(x, 3 * math.sin(x) + 0.3 * x) for x in xs]
    parts = inside(line, -1.0, 2.5)
    for part in parts:
        for x, y in part:  # each point lies on the line
            before = max(i for i in range(len(xs)) if xs[i] <= x + 1e-9)
            (a, u), (b, v) = line[before], line[min(before + 1, len(xs) - 1)]
            assert y == pytest.approx(u if a == b else u + (x - a) / (b - a) * (v - u), abs=1e-6)
            assert -1 - 1e-9 <= y <= 2.5 + 1e-9
    spans = [(part[0][0], part[-1][0]) for part in parts]
    for index in range(4000):  # and what is not in a part is outside
        x = 20 * index / 4000
        before = min(int(x / 0.5), 39)
        (a, u), (b, v) = line[before], line[before + 1]
        y = u + (x - a) / (b - a) * (v - u)
        if min(abs(y + 1), abs(y - 2.5)) > 1e-6:
            assert any(first <= x <= last for first, last in spans) == (-1 < y < 2.5), x
    assert inside([(0, math.nan), (1, math.inf)], 0, 1) == []
    assert (
        band([(0, 0), (1, 4)], [(0, 1), (1, 5)], 0, 2) != [] == band([(0, 0), (1, math.nan)], [(0, 1), (1, 5)], 0, 2)
    )


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_few_and_inside(seed):
    generator = torch.Generator().manual_seed(seed)
    low = float(10 ** (8 * torch.rand((), generator=generator) - 4))
    high = low * (1 + float(10 ** (6 * torch.rand((), generator=generator) - 3)))
    for ticks in (linear_ticks(low, high), log_ticks(low, high)):
        assert 2 <= len(ticks) <= 6 and all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)
        assert ticks == sorted(set(ticks))
    assert all(tick == int(tick) for tick in linear_ticks(low, low + 2, whole=True))


def test_places_and_limits():
    axis = Axis(1.0, 100.0, 0.0, 10.0, log=True)
    assert axis.at(10.0) == pytest.approx(5.0) and math.isnan(axis.at(0.0)) and math.isnan(axis.at(math.inf))
    assert Axis(0.0, 4.0, 200.0, 100.0).at(1.0) == 175.0
    for values in ([], [3.0], [0.0], [-2.0, 5.0]):
        low, high = limits_of(values)
        assert low < high and all(low <= value <= high for value in values)


def test_a_spike_survives_thinning():
    values = [1.0] * 10_000
    values[6_789] = 50.0
    kept = thinned(len(values), values, 100)
    assert 6_789 in kept and {0, 9_999} <= set(kept) and len(kept) <= 100
    assert 6_789 not in range(0, 10_000, 100)  # each hundredth point would lose it
    assert thinned(5, values, 100) == [0, 1, 2, 3, 4]
    assert len(thinned(10_000, [math.nan] * 10_000, 100)) <= 100


def test_points_say_their_numbers():
    chart = Chart("t", "step", "y", [Curve("a<b", [(0, 1.5), (10, 2.5)], [1.0, 2.0], [2.0, 3.0])])
    assert "<title>a&lt;b, step 10: 2.5 (2 to 3)</title>" in line_chart(chart)
    assert "<circle" not in line_chart(chart, tips=False)
