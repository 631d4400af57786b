"""The style of the figures, how they are written, and heat-maps of R.

A figure is a column or a page wide. Its colours (Okabe & Ito) are told apart by all readers."""

import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from atlas.errors import AtlasError

COLUMN, PAGE = 3.3, 6.9  # inches
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
PALE = "#D0D0D0"  # tasks that are not learned yet
STYLE = {"font.size": 7, "axes.titlesize": 7.5, "figure.titlesize": 8, "legend.fontsize": 6.5}
STYLE |= {"xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.linewidth": 0.6}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {"lines.linewidth": 1.2, "grid.color": "#E4E4E4", "grid.linewidth": 0.5}
STYLE |= {"axes.axisbelow": True, "pdf.fonttype": 42}


def new_figure(width, height):
    """An empty figure in the one style; inches."""
    matplotlib.rcParams.update(matplotlib.rcParamsDefault | STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, folder, name):
    """Write NAME.png and NAME.pdf; their paths."""
    os.makedirs(folder, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once; it takes most of the time
    png, pdf = (Path(folder, f"{name}.{kind}") for kind in ("png", "pdf"))
    figure.savefig(png, dpi=200, pil_kwargs={"optimize": True})
    figure.savefig(pdf, metadata={"CreationDate": None})  # no date: equal runs give equal files
    return [png, pdf]


def shortened(name, length):
    return name if len(name) <= length else name[: length - 1] + "…"


def column_word(results):
    return "segment" if results["protocol"] == "tfcl" else "task"


def title_of(results):
    rows = len(results["matrix"]["J"]) - 1
    said = "" if results["complete"] else f" · unfinished, {rows} learned"
    return f"{results['protocol'].upper()} · {results['method']} · seed {results['seed']}{said}"


def heatmaps(title, rows):
    """R of J of rows of runs (table.problems), four side by side, each the mean over its seeds, and
    grey where a task is not learned yet."""

    def matrix(run):  # nan where a score is None or a row was not scored
        empty = [None] * len(run["tasks"])
        return np.array([row or empty for row in run["matrix"]["J"]], float).reshape(-1, len(empty))

    across = min(4, len(rows))
    down = -(-len(rows) // across)
    tall = 0.62 + 0.17 * len(rows[0]["runs"][0]["matrix"]["J"])
    figure = new_figure(max(COLUMN, PAGE * across / 4), 0.6 + tall * down)
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    for ax, row in zip(axes.flat, rows):
        R = np.mean([matrix(run) for run in row["runs"]], axis=0)  # [rows, tasks]
        if not len(R):
            raise AtlasError("the run has no scores yet, so there is nothing to draw")
        image = draw_heatmap(ax, R, row["runs"][0])
        ax.set_title(row["label"])
        ax.label_outer()
    figure.colorbar(image, ax=axes, pad=0.02, aspect=40).outline.set_linewidth(0.4)
    figure.suptitle(f"{title}\nJ on test clips; grey: not learned yet")
    return figure


def draw_heatmap(ax, R, results):
    """Draw R [rows, tasks] with its values into an axes."""
    rows, tasks = R.shape
    joint = results["method"] == "joint"
    learned = np.arange(rows) * (tasks if joint else 1)
    future = np.arange(tasks)[None] >= learned[:, None]
    ax.set_facecolor(PALE)
    hidden = np.ma.array(R, mask=future | np.isnan(R))
    image = ax.imshow(hidden, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    style = {"ha": "center", "va": "center", "fontsize": float(np.clip(40 / tasks, 2.5, 6))}
    for (i, j), value in np.ndenumerate(R):
        colour = "#606060" if future[i, j] else "white" if value < 0.6 else "black"
        said = "–" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
        ax.text(j, i, said, color=colour, **style)
    word = column_word(results)
    ax.set_xticks(range(tasks), range(1, tasks + 1))
    ax.set_yticks(range(rows), ["none", "all"] if joint else ["none", *range(1, rows)])
    ax.set(xlabel=word, ylabel="at checkpoint" if word == "segment" else "after task")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return image
