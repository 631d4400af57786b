"""Figures of one run: each function draws one Figure; `save` writes it as .png and .pdf.

A figure is a column or a page wide. The colours (Okabe & Ito) are told apart by all readers.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    """An empty figure in the one style, without a window; inches."""
    matplotlib.rcParams.update(matplotlib.rcParamsDefault | STYLE | {"backend": "Agg"})
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure, folder, name):
    """Write NAME.png and NAME.pdf; their paths."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        said = f"{folder} is a file, not a folder for figures; choose another --out"
        raise AtlasError(said) from None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once; it takes most of the time
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    figure.savefig(png, dpi=200, pil_kwargs={"optimize": True})
    figure.savefig(pdf, metadata={"CreationDate": None})  # no date: equal runs give equal files
    return [png, pdf]


def shortened(name, length):
    return name if len(name) <= length else name[: length - 1] + "…"


def column_word(results):
    """What a column of R is called."""
    return "segment" if results["protocol"] == "tfcl" else "task"


def title_of(results):
    """Protocol, method and seed of one run."""
    rows = len(results["matrix"]["J"]) - 1
    said = "" if results["complete"] else f" · unfinished, {rows} learned"
    return f"{results['protocol'].upper()} · {results['method']} · seed {results['seed']}{said}"


def matrix_of(results):
    """R of J, [rows, tasks]; nan where a score is None or a row was not scored."""
    width = len(results["tasks"])
    rows = [row or [None] * width for row in results["matrix"]["J"]]
    return np.array(rows, float).reshape(-1, width)


def run_figures(results, folder):
    """{name: Figure} of one run, from its files alone: the heat-map of R, and the trace of a stream
    that watched its loss."""
    if not results["matrix"]["J"]:
        raise AtlasError(f"{folder} has no scores yet, so there is nothing to draw")
    figures = {"heatmap": heatmap(results)}
    if found := windows(folder):
        figures["trace"] = trace(results, found)
    return figures


def heatmap(results):
    """R: rows after a task, columns tasks; the cells of tasks not learned yet are grey."""
    R = matrix_of(results)
    width = PAGE if R.shape[1] > 8 else COLUMN
    figure = new_figure(width, max(2.0, 1.35 + 0.24 * len(R)))
    ax = figure.subplots()
    image = draw_heatmap(ax, R, results, (width - 1.1) / R.shape[1])
    names = [task["name"] for task in results["tasks"]]
    if column_word(results) == "task":  # segments are numbered already
        names = [f"{j} {shortened(name, 17)}" for j, name in enumerate(names, start=1)]
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    figure.colorbar(image, ax=ax, pad=0.02, aspect=30).outline.set_linewidth(0.4)
    figure.suptitle(f"{title_of(results)}\nJ on test clips; grey: not learned yet")
    return figure


def draw_heatmap(ax, R, results, cell, untold=True):
    """Draw R [rows, tasks] with its values into an axes. `cell`: the width of a cell in inches;
    `untold`: also write the values of tasks that are not learned yet."""
    rows, tasks = R.shape
    joint = results["method"] == "joint"
    learned = np.arange(rows) * (tasks if joint else 1)
    future = np.arange(tasks)[None] >= learned[:, None]
    ax.set_facecolor(PALE)
    hidden = np.ma.array(R, mask=future | np.isnan(R))
    image = ax.imshow(hidden, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    size = float(np.clip(26 * cell, 3.2, 7))
    for (i, j), value in np.ndenumerate(R):
        if untold or not future[i, j]:
            said = "–" if np.isnan(value) else f"{value:.2f}"
            if cell < 0.25:
                said = said.removeprefix("0")
            colour = "#606060" if future[i, j] else "white" if value < 0.6 else "black"
            ax.text(j, i, said, ha="center", va="center", fontsize=size, color=colour)
    word = column_word(results)
    ax.set_xticks(range(tasks), range(1, tasks + 1))
    ax.set_yticks(range(rows), ["none", "all"] if joint else ["none", *range(1, rows)])
    ax.set(xlabel=word, ylabel="at checkpoint" if word == "segment" else "after task")
    ax.tick_params(length=0, labelsize=min(6.5, 1.4 * size))
    ax.spines[:].set_visible(False)
    return image


def windows(folder):
    """The loss windows of log.jsonl, [{"step", "mean", "std", "fired"}]; empty where none."""
    from atlas.journal import Journal  # it comes with torch

    return [line["window"] for line in Journal(folder).lines() if "window" in line]


def trace(results, found):
    """A stream: the loss of its windows, where it consolidated, and underneath the true drifts."""
    steps, level, spread = (
        np.array([window[name] for window in found], float) for name in ("step", "mean", "std")
    )
    fired = [window["step"] for window in found if window["fired"]]
    figure = new_figure(PAGE, 2.3)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    band = {"color": SKY, "alpha": 0.35, "linewidth": 0}
    top.fill_between(steps, level - spread, level + spread, **band, label="± standard deviation")
    top.plot(steps, level, "o-", color=BLUE, markersize=2.5, label="mean task loss of a window")
    for k, step in enumerate(fired):
        top.axvline(step, color=RED, linestyle="--", label=None if k else "consolidated")
    top.set_ylabel("loss")
    top.grid(axis="y")
    drifts = results["drifts"]
    edges = [0, *drifts, max(steps[-1], *drifts, 1)]
    for k, (start, end) in enumerate(zip(edges, edges[1:])):
        bottom.axvspan(start, end, facecolor=PALE if k % 2 else "#F0F0F0", linewidth=0)
        bottom.text((start + end) / 2, 0.5, str(k + 1), ha="center", va="center", clip_on=True)
    for k, step in enumerate(drifts):
        bottom.axvline(step, color=BLACK, linewidth=1.5, label=None if k else "true drift")
    bottom.set(xlim=(0, edges[-1]), ylim=(0, 1), yticks=[], xlabel="optimiser step")
    bottom.set_ylabel("segment", rotation=0, ha="right", va="center")
    figure.legend(loc="outside lower center", ncols=4)
    said = f"{len(fired)} consolidations, {len(drifts)} true drifts"
    figure.suptitle(f"{title_of(results)}: {said}")
    return figure
