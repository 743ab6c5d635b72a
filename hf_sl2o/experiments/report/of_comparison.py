"""The report of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...foundation.checked import shown
from ..curves import mean_curve, mean_steps_to, steps_to
from ..figures import NAMES
from ..levels import at_edge, negated
from .of_run import metric_charts, state_of
from .parts import Bar, Bars, Chart, Curve, Limits, Point, Report, Table, number, percent, sections, size, with_range
from .reading import curve, curves, is_number, last_part, mapping, numbers, settings
from .subspace import explained, paths_of_coefficients

_FIRST_STEPS = 250
_MOST_ARMS = 32

Part = str | Chart | Bars | Table
Runs = Mapping[str, Mapping[str, Any]]


class Arms:
    """The arms of one comparison: checked curves of each, over its seeds."""

    def __init__(self, runs: Any, where: str) -> None:
        if not isinstance(runs, dict) or not runs or not all(isinstance(run, dict) for run in runs.values()):
            raise ValueError(f"{where} has 'runs': {shown(runs)}, expected an object with a run for each arm")
        self.runs: Runs = dict(list(runs.items())[:_MOST_ARMS])
        self.left = len(runs) - len(self.runs)
        self.styles = {arm: i for i, arm in enumerate(sorted(self.runs, key=lambda arm: not arm.startswith("sl2o")))}
        self.eval = {arm: self._seeds(run, "eval", f"{where}: {arm}") for arm, run in self.runs.items()}
        self.train = {arm: self._seeds(run, "train_loss", f"{where}: {arm}") for arm, run in self.runs.items()}
        self.accuracy = {
            arm: curves(run.get("accuracy_per_seed"), f"{where}: {arm}: 'accuracy_per_seed'")
            for arm, run in self.runs.items()
        }
        if not any(self.eval.values()):
            raise ValueError(f"{where} has arms without an 'eval' curve; give the comparison.json of a comparison")

    @staticmethod
    def _seeds(run: Mapping[str, Any], key: str, where: str) -> list[list[Point]]:
        """A curve a seed, or the mean alone where no other was kept."""
        kept = curves(run.get(f"{key}_per_seed"), f"{where}: '{key}_per_seed'")
        return kept or ([curve(run[key], f"{where}: {key!r}")] if run.get(key) else [])

    def name(self, arm: str) -> str:
        return NAMES.get(arm, arm)

    def curve(self, arm: str, seeds: Sequence[Sequence[Point]], scale: float = 1.0) -> Curve:
        """The mean over seeds, with the lowest and the highest as its band."""
        mean = mean_curve(seeds)
        at = [dict(of) for of in seeds]
        band = [[scale * of[x] for of in at] for x, _ in mean] if len(seeds) > 1 else []
        low, high = (
            [side(values) if all(map(math.isfinite, values)) else math.nan for values in band] for side in (min, max)
        )
        points = [(x, scale * y) for x, y in mean]
        return Curve(self.name(arm), points, low, high, self.styles[arm], arm.startswith("sl2o"))

    def charts(
        self, of: Mapping[str, list[list[Point]]], title: str, y: str, limits: Limits, log: bool
    ) -> list[Chart]:
        """All steps, and before that the first ones, where the arms' runs differ in length or are long."""
        ends = [seeds[0][-1][0] for seeds in self.eval.values() if seeds]
        lines = [self.curve(arm, seeds) for arm, seeds in of.items() if seeds]
        beyond = any(value > limits[1] for line in lines for _, value in line.points)
        note = "A curve that leaves the frame is above the loss at the start." if beyond else ""
        made = []
        for limit in sorted({min(_FIRST_STEPS, *ends), max(ends)}) if lines else ():
            said = f"{title}, {'first ' if limit < max(ends) else ''}{number(limit)} steps"
            made.append(Chart(said, "step", y, lines, limits, (0.0, limit), log, note=note))
        return made

    def loss_charts(self) -> list[Part]:
        """Training and validation loss in the same frame, as `figures.plot` does it."""
        losses = [y for of in (self.eval, self.train) for seeds in of.values() for line in seeds for _, y in line]
        starts = [seeds[0][0][1] for seeds in self.eval.values() if seeds]
        low = min(filter(math.isfinite, losses), default=0.0)
        high = max(filter(math.isfinite, starts), default=1.0)
        if high <= low:
            high = max(filter(math.isfinite, losses), default=1.0)
        margin = 0.03 * (high - low)
        log = low > 0 and high / low > 2
        limits = (low * 0.95, high * 1.03) if log else (low - margin, high + margin)
        return [
            *self.charts(self.eval, "Validation loss", "validation loss", limits, log),
            *self.charts(self.train, "Training loss", "training loss", limits, log),
        ]

    def accuracy_charts(self) -> list[Chart]:
        lines = [self.curve(arm, seeds, 100.0) for arm, seeds in self.accuracy.items() if seeds]
        return [Chart("Accuracy on held-out data", "step", "% correct", lines)] if lines else []

    def final(self, arm: str) -> list[float]:
        return [line[-1][1] for line in self.eval[arm] if line]


def comparison_report(data: Mapping[str, Any], where: str, folder: Path | None, title: str) -> Report:
    """Reports on a comparison.

    Args:
        data (`Mapping`): What stands in comparison.json.
        where (`str`): Its name, for messages.
        folder (`Path`, *optional*): Where the comparison ran: its basis and checkpoints.
        title (`str`): Of the page.

    Raises:
        `ValueError`: it is not what a comparison writes.
    """
    arms = Arms(data.get("runs"), where)
    targets = [*_targets(arms, data, where)]
    variance: list[Part] = list(explained(folder / "basis")) if folder else []
    share = data.get("explained_variance")
    if not variance and is_number(share):
        variance = [
            f"The basis holds {percent(share)} of the variance of the recorded run. For comparison: the first 40 "
            "principal components of a random walk of 60 snapshots hold 99.1 % of its variance, so that explained "
            "variance alone proves nothing."
        ]
    made = sections(
        ("Summary", [*_headline(arms, targets), arms_table(arms, targets), *_more(arms)]),
        ("Curves", [*arms.loss_charts(), *arms.accuracy_charts(), *seeds_said(arms)]),
        ("Steps to target", [bars for _, bars in targets]),
        ("Inside the subspace", _inside(arms, folder)),
        ("Explained variance", variance),
        ("Generated sentences", _generation(arms, mapping(data, "generation", where))),
        ("Meta-training", _meta(data, where)),
        ("Cost, paid once", _cost(mapping(data, "amortised", where))),
        ("Environment", settings(data.get("environment"))),
        ("Config", _config(arms, data)),
    )
    return Report("a comparison of optimizers", title, made)


def _headline(arms: Arms, targets: Sequence[tuple[dict[str, float | None], Bars]]) -> list[Part]:
    means = {arm: sum(of) / len(of) for arm in arms.runs if (of := arms.final(arm))}
    best = min(means, key=lambda arm: means[arm] if math.isfinite(means[arm]) else math.inf)
    said = [f"Lowest validation loss at the end: {arms.name(best)}, {number(means[best])}."]
    for steps, bars in targets[:1]:
        reached = {arm: value for arm, value in steps.items() if value is not None}
        if reached:
            first = min(reached, key=reached.__getitem__)
            said.append(f"Fewest s{bars.title[1:]}: {arms.name(first)}, {_rounded(reached[first])}.")
    return [" ".join(said)]


def _targets(arms: Arms, data: Mapping[str, Any], where: str) -> Iterable[tuple[dict[str, float | None], Bars]]:
    """The levels of a comparison: losses, then accuracies."""
    for key, of in (("steps_to", arms.eval), ("steps_to_accuracy", arms.accuracy)):
        for name, level in mapping(data, key, where).items():
            target = level.get("target") if isinstance(level, dict) else None
            if not is_number(target):
                raise ValueError(f"{where} has {key!r} with {name!r}: {shown(level)}, expected its 'target'")
            if key == "steps_to":
                yield steps_bars(arms, of, target, f"Steps to {name} (loss {number(target)})")
            else:
                below = {arm: [negated(line) for line in seeds] for arm, seeds in of.items()}
                yield steps_bars(arms, below, -target, f"Steps to {name} (accuracy {percent(target)})")


def steps_bars(
    arms: Arms, of: Mapping[str, Sequence[Sequence[Sequence[float]]]], target: float, title: str
) -> tuple[dict[str, float | None], Bars]:
    """Mean steps of each arm until its curve is at most `target`, and bars that show the range over seeds, too."""
    found: dict[str, float | None] = {}
    bars = []
    for arm, seeds in of.items():
        steps = [step for line in seeds if (step := steps_to(line, target)) is not None]
        found[arm] = mean = mean_steps_to(seeds, target) if seeds else None
        low, high = (min(steps), max(steps)) if mean is not None and len(steps) > 1 else (None, None)
        why = f"never in {len(seeds) - len(steps)} of {len(seeds)} seeds" if seeds else "not measured"
        bars.append(Bar(arms.name(arm), mean, low, high, arms.styles[arm], why))
    bars.sort(key=lambda bar: math.inf if bar.value is None else bar.value)
    return found, Bars(title, "steps, mean over seeds", bars)


def arms_table(arms: Arms, targets: Sequence[tuple[dict[str, float | None], Bars]]) -> Table:
    tested = any(numbers(run.get("test_accuracy_per_seed")) for run in arms.runs.values())
    heads = ["arm", "validation loss", *["test accuracy"] * tested]
    heads += [bars.title.replace("_", " ") for _, bars in targets]
    heads += ["learning rate", "seconds", "memory of the optimizer", "peak of memory"]

    def order(arm: str) -> tuple[float, float]:
        steps = targets[0][0].get(arm) if targets else None
        final = arms.final(arm)
        return math.inf if steps is None else steps, sum(final) / len(final) if final else math.inf

    rows = []
    for arm in sorted(arms.runs, key=order):
        run, final = arms.runs[arm], arms.final(arm)
        tests = numbers(run.get("test_accuracy_per_seed"))
        rate, seconds, state, peak = (
            value if is_number(value := run.get(key)) else None
            for key in ("learning_rate", "seconds", "state_bytes", "peak_bytes")
        )
        steps = [_rounded(of.get(arm)) for of, _ in targets]
        accuracy = [percent(sum(tests) / len(tests)) if tests else "-"] * tested
        loss = with_range(sum(final) / len(final), final) if final else "-"
        units = f" ({run['units']})" if isinstance(run.get("units"), str) else ""
        rows.append(
            [arms.name(arm), loss, *accuracy, *steps, number(rate) + units, number(seconds), size(state), size(peak)]
        )
    known = [column for column in range(len(heads)) if any(row[column] != "-" for row in rows)]
    return Table([heads[i] for i in known], [[row[i] for i in known] for row in rows])


def _rounded(steps: float | None) -> str:
    """A mean of steps, which are whole numbers."""
    return "never" if steps is None else number(round(steps, 1))


def _more(arms: Arms) -> Iterable[str]:
    if arms.left:
        yield f"{arms.left} further arms are not shown."
    yield "† moves the coefficients of the subspace with that optimizer. In brackets: the lowest and the highest seed."
    edge = [arms.name(arm) for arm, run in arms.runs.items() if _at_edge(run)]
    if edge:
        yield f"At the edge of its grid of learning rates, a better one may lie outside: {', '.join(edge)}."


def _at_edge(run: Mapping[str, Any]) -> bool:
    grid = run.get("grid")
    whole = isinstance(grid, list) and all(isinstance(entry, list) and len(entry) == 3 for entry in grid)
    return whole and {"units", "learning_rate"} <= set(run) and at_edge(run)


def seeds_said(arms: Arms) -> Iterable[str]:
    counts = sorted({len(seeds) for seeds in arms.eval.values() if seeds})
    if counts[-1] > 1:
        yield f"Lines are means over {counts[-1]} seeds; bands go from the lowest to the highest seed."


def _inside(arms: Arms, folder: Path | None) -> list[Part]:
    """What the checkpoints of each arm tell, those of its first seed."""
    if folder is None:
        return []
    logs = {arm: found[0]["log_history"] for arm in arms.runs if _plain(arm) and (found := state_of(folder / arm))}
    by_title: dict[str, list[tuple[str, Chart]]] = {}
    for arm, log in logs.items():
        for chart in metric_charts([entry for entry in log if "sl2o_coefficients_norm" in entry]):
            if chart.y.startswith(("|", "share")):
                by_title.setdefault(chart.title, []).append((arm, chart))
    made: list[Part] = []
    for title, of in by_title.items():
        lines = [
            Curve(arms.name(arm), chart.curves[0].points, style=arms.styles[arm], ours=arm.startswith("sl2o"))
            for arm, chart in of
        ]
        last = max(chart.x_limits[1] for _, chart in of if chart.x_limits)
        first = of[0][1]
        made.append(Chart(title, "step", first.y, lines, x_limits=(0.0, last), log=first.log, note="First seed."))
    for arm in arms.runs:
        if _plain(arm):
            made += paths_of_coefficients(folder / arm, arms.name(arm))
    return made


def _plain(arm: str) -> bool:
    """Whether the name of an arm is that of a folder, and no path out of the comparison."""
    return arm not in ("", ".", "..") and last_part(arm) == arm and "\\" not in arm and "\0" not in arm


def _meta(data: Mapping[str, Any], where: str) -> list[Chart]:
    if not data.get("meta_validation"):
        return []
    points = curve(data["meta_validation"], f"{where}: 'meta_validation'")
    line = Curve("held-out loss", points, ours=True)
    return [Chart("Held-out loss of the rule, mean over a run", "meta-epoch", "held-out loss", [line], log=True)]


def _generation(arms: Arms, made: Mapping[str, Any]) -> Iterable[Part]:
    """Scores of the sentences that `--stage generate` decoded: means over seeds, with the range."""
    for name, of in made.items():
        runs = mapping(of, "runs", f"'generation': {name!r}") if isinstance(of, dict) else {}
        seeds = {arm: [run for run in found if isinstance(run, dict)] for arm, found in runs.items() if found}
        scores = dict.fromkeys(
            key for found in seeds.values() for run in found for key, value in run.items() if is_number(value)
        )
        scores.pop("seed", None)
        rows = []
        for arm, found in seeds.items():
            values = {key: [run[key] for run in found if is_number(run.get(key))] for key in scores}
            whole = {key: of_key for key, of_key in values.items() if len(of_key) == len(found)}
            cells = (with_range(sum(v) / len(v), v) if (v := whole.get(key)) else "-" for key in scores)
            rows.append([arms.name(arm), *cells, "yes" if any(run.get("diverged") for run in found) else "no"])
        if rows:
            yield f"{name}: {number(of.get('meanings'))} meanings. Higher is better."
            yield Table(["arm", *scores, "a seed diverged"], rows)


def _cost(cost: Mapping[str, Any]) -> list[Part]:
    if not cost:
        return []
    unit, rows = str(cost.get("unit", "training steps")), []
    names = {
        "trajectory": "recording the run", "meta_training": "meta-training of the rule", "total": "together",
        "other_recorded_runs": "further runs, from which the recorded one was chosen",
    }  # fmt: skip
    for key, name in names.items():
        if is_number(cost.get(key)):
            rows.append((name, f"{number(cost[key])} {unit}"))
    total = cost.get("total")
    if is_number(total) and total > 0:
        rows += [
            (f"together, spread over {runs:,} runs", f"{number(total / runs)} {unit} a run")
            for runs in (10, 100, 1000)
        ]
    for arm, steps in mapping(cost, "rules", "'amortised'").items():
        known = f"{number(steps)} {unit}" if is_number(steps) else "unknown"
        rows.append((f"the rule of {NAMES.get(arm, arm)}, used unchanged: once for all tasks", known))
    for stage, seconds in mapping(cost, "seconds", "'amortised'").items():
        rows.append((f"seconds of the stage {stage!r}", number(seconds) if is_number(seconds) else "-"))
    return [Table((), rows)]


def _config(arms: Arms, data: Mapping[str, Any]) -> list[Table]:
    tables = [*settings({"n": data.get("n")} if "n" in data else {})]
    for key, name in (("recipe", "Recipe"), ("training", "Training arguments"), ("data", "Data")):
        tables += settings(data.get(key), name)
    return tables
