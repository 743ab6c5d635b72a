"""Draws the figures of docs/concepts.md: `python docs/figures/make.py`. What looks measured was computed here.

trajectory.svg   a small network's run: its path in the first two directions, and what the first k directions hold
step.svg         what a step does: project, rule, lift
two_points.svg   a noisy run and the running average of its weights
lora.svg         which numbers move without a basis
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
INK, BLUE, ORANGE, GREEN, PALE = "#222222", "#3f51b5", "#d95f02", "#1b7837", "#e8eaf6"
# Text stays text; ids in the file depend on nothing but the drawing. Sizes are read on a phone, too.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "hf_sl2o", "font.size": 14, "font.family": "sans-serif"}


def recorded_run(steps: int = 300, snapshots: int = 60) -> np.ndarray:
    """Trains a small network with AdamW, and returns its weights: (snapshots, n)."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    x = torch.randn(512, 8)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    optimizer, rows = torch.optim.AdamW(network.parameters(), lr=3e-3), []
    for step in range(steps):
        if step % (steps // snapshots) == 0:
            rows.append(torch.nn.utils.parameters_to_vector(network.parameters()).detach().numpy().copy())
        batch = torch.randint(512, (32,))
        loss = (network(x[batch]) - y[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.stack(rows).astype(np.float64)


def principal(snapshots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of centred snapshots (T, k) along their principal directions, and the share each direction holds."""
    u, s, _ = np.linalg.svd(snapshots - snapshots.mean(axis=0), full_matrices=False)
    return u * s, s**2 / (s**2).sum()


def trajectory(figure: Figure) -> None:
    left, right = figure.subplots(2, 1)
    run = recorded_run()
    along, shares = principal(run)
    walk = np.random.default_rng(0).standard_normal(run.shape).cumsum(axis=0)
    left.plot(along[:, 0], along[:, 1], "o-", color=BLUE, markersize=4, linewidth=1)
    for at, text, shift in ((0, "start", (8, 8)), (-1, "end", (8, -12))):
        left.annotate(text, along[at, :2], xytext=shift, textcoords="offset points", color=INK)
    left.set(xlabel="along direction 1", ylabel="along direction 2")
    left.set_title(f"60 snapshots of {run.shape[1]} weights", fontsize=14)
    left.margins(0.2)
    first = np.arange(1, 41)
    right.plot(first, 100 * shares.cumsum()[:40], color=BLUE, label="this run")
    right.plot(first, 100 * principal(walk)[1].cumsum()[:40], "--", color=ORANGE, label="a random walk")
    right.set(xlabel="first k directions", ylabel="% of the movement", ylim=(0, 104))
    right.legend(frameon=False, loc="lower right")


def box(axes: Axes, x: float, y: float, text: str, width: float = 3.4, height: float = 1.1, color: str = PALE) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.05,rounding_size=0.15",
            facecolor=color, edgecolor=INK, linewidth=1,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", side: float = 0.15
) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.3})
    if text:
        place = ((start[0] + end[0]) / 2 + side, (start[1] + end[1]) / 2)
        axes.text(*place, text, ha="left" if side > 0 else "right", va="center", color=BLUE)


def canvas(figure: Figure, width: float, height: float) -> Axes:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return axes


def step(figure: Figure) -> None:
    axes = canvas(figure, 8.6, 9.8)
    box(axes, 2.3, 9.0, "n gradients")
    arrow(axes, (2.3, 8.4), (2.3, 7.2), "project:  g = Uᵀ grad")
    box(axes, 2.3, 6.6, "g: 40 numbers")
    arrow(axes, (2.3, 6.0), (2.3, 4.8), "with momenta of g")
    box(axes, 2.3, 4.2, "rule: a small LSTM", color="#fde0c5")
    arrow(axes, (2.3, 3.6), (2.3, 2.4), "delta: 40 numbers")
    box(axes, 2.3, 1.8, "c = c + delta")
    arrow(axes, (4.1, 1.8), (5.0, 1.8))
    box(axes, 6.7, 1.8, "n weights", width=3.0, color="#d9f0d3")
    axes.text(6.7, 1.05, "lift:\nadds U delta", ha="center", va="top", color=BLUE)


def two_points(figure: Figure) -> None:
    """A noisy run on a quadratic, and the average in which step t weighs as t^4."""
    axes, noise = figure.subplots(), np.random.default_rng(3)
    curvature, at = np.array([1.0, 0.4]), np.array([-3.0, 3.2])
    last, means, mean = [at.copy()], [at.copy()], at.copy()
    for t in range(1, 121):
        at = at - 0.15 * (curvature * at + 2.0 * noise.standard_normal(2))
        mean = mean + (at - mean) * (1 - (1 - 1 / (t + 1)) ** 5)
        last.append(at.copy())
        means.append(mean.copy())
    points, averages = np.array(last), np.array(means)
    x, y = np.meshgrid(np.linspace(-4, 2.5, 80), np.linspace(-2.5, 4.5, 80))
    axes.contour(x, y, curvature[0] * x**2 + curvature[1] * y**2, levels=9, colors="#cccccc", linewidths=0.8)
    axes.plot(*points.T, "-", color=BLUE, linewidth=1, label="last step: trains here")
    axes.plot(*averages.T, "-", color=ORANGE, linewidth=2.5, label="average: seen and saved")
    axes.plot(*points[-1], "o", color=BLUE, markersize=8)
    axes.plot(*averages[-1], "o", color=ORANGE, markersize=8)
    axes.plot(0, 0, "+", color=INK, markersize=14, markeredgewidth=2, label="minimum")
    axes.set(xticks=[], yticks=[], xlim=(-4, 2.5), ylim=(-2.5, 6.1))
    axes.legend(frameon=False, loc="upper right")


def lora(figure: Figure) -> None:
    axes = canvas(figure, 8.6, 7.4)
    box(axes, 2.2, 6.2, "W: frozen", width=3.2, height=1.6, color="#eeeeee")
    axes.text(4.2, 6.2, "+", ha="center", va="center", fontsize=20)
    box(axes, 5.1, 6.2, "B", width=0.7, height=1.6, color="#d9f0d3")
    box(axes, 7.0, 6.2, "A", width=2.2, height=0.7, color="#d9f0d3")
    for x, bottom in ((5.1, 5.3), (7.0, 5.75)):
        arrow(axes, (x, bottom), (x, 4.2))
    axes.text(0.5, 4.75, "each factor's gradients,\nand how well they agree", color=BLUE, va="center")
    box(axes, 6.05, 3.55, "one LSTM for all", width=3.8, color="#fde0c5")
    arrow(axes, (6.05, 2.9), (6.05, 1.75))
    axes.text(0.5, 2.35, "length and direction\nof each factor's step", color=BLUE, va="center")
    box(axes, 6.05, 1.1, "B and A move", width=3.8, color="#d9f0d3")


FIGURES = {"trajectory": (5.0, 6.6), "step": (5.0, 5.6), "two_points": (5.0, 4.4), "lora": (5.0, 4.3)}


def make(folder: Path) -> None:
    """Writes the figures as SVG."""
    with matplotlib.rc_context(STYLE):
        for name, size in FIGURES.items():
            figure = Figure(figsize=size, layout=None if name in ("step", "lora") else "constrained")
            globals()[name](figure)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output_dir", type=Path, default=HERE, help="where the figures go (default: beside this file)"
    )
    make(parser.parse_args().output_dir)
