"""Figures of runs, from their files: each function draws one Figure, `save` writes it as .png (< 100 KB) and .pdf.

Everything is 3.3 in (a column) or 6.9 in (a page) wide and drawn in one style. Colours: Okabe & Ito's, and viridis, which colour-blind readers tell apart.
"""

import io
import json
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from atlas.errors import AtlasError
from atlas.report.table import problems

COLUMN, PAGE = 3.3, 6.9  # inches
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
    "#D0D0D0",
)
PALETTE, MARKERS = (
    (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK),
    "os^Dv<>P",
)  # 7 colours and 8 markers: a pair comes back after 56
BANDS = 5  # with more curves than this, bands hide them
FIRST = {
    "lra": 0,
    "finetune": 1,
    "frozen": 2,
    "frozen_lora": 3,
}  # the same look in every figure, whoever else is there; joint is black
LARGEST_PNG = 100_000  # bytes


def style():
    """The one style of all figures. Headless."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update(matplotlib.rcParamsDefault | {"backend": "Agg"})
    matplotlib.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 7, "axes.titlesize": 7.5, "figure.titlesize": 8, "axes.labelsize": 7, "legend.fontsize": 6.5,
        "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5,
        "ytick.major.size": 2.5, "lines.linewidth": 1.2, "lines.markersize": 4, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "grid.color": "#E4E4E4", "grid.linewidth": 0.5, "axes.axisbelow": True, "pdf.fonttype": 42, "savefig.facecolor": "white",
    })  # fmt: skip


def panels(rows, columns, width, height, **options):
    """(Figure, axes [rows, columns]) in the style; inches."""
    style()
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, folder, name):
    """Write NAME.png and NAME.pdf and return their paths. A png that is too large loses colours, then resolution; the pdf keeps everything."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AtlasError(
            f"{folder} is a file, not a folder for figures; choose another --out"
        ) from None
    figure.draw_without_rendering()
    figure.set_layout_engine(
        "none"
    )  # laid out once: it does not depend on the resolution, and takes most of the time
    for dpi, colours in (
        (300, 0),
        (200, 0),
        (150, 0),
        (200, 256),
        (150, 256),
        (120, 256),
        (105, 256),
        (90, 128),
        (75, 64),
        (60, 32),
    ):
        content = png(figure, dpi, colours)
        if len(content) < LARGEST_PNG:
            break
    (folder / f"{name}.png").write_bytes(content)
    figure.savefig(
        folder / f"{name}.pdf", metadata={"CreationDate": None}
    )  # no date: the same run gives the same file
    return [folder / f"{name}.png", folder / f"{name}.pdf"]


def png(figure, dpi, colours=0):
    """The bytes of a figure as png; `colours` > 0: of a palette of so many."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    if not colours:
        return drawn.getvalue()
    Image.open(drawn).convert("RGB").quantize(
        colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    ).save(packed, "png", optimize=True)
    return packed.getvalue()


def shortened(name, length):
    return name if len(name) <= length else name[: length - 1] + "…"


def numbered(tasks, length):
    """["1 NAME", ...], the names shortened; a stream's segments are numbered already."""
    return [
        task["name"]
        if task["name"].startswith("segment")
        else f"{j + 1} {shortened(task['name'], length)}"
        for j, task in enumerate(tasks)
    ]


def title_of(results):
    """Protocol, method, seed; and that it is one run."""
    stages = len(results["matrix"]["J"]) - 1
    unfinished = "" if results["complete"] else f" · unfinished ({stages} stages)"
    return f"{results['protocol'].upper()} · {results['method']} · seed {results['seed']} (1 seed){unfinished}"


# ---- one run ---------------------------------------------------------------------------------------------------------


def run_figures(results, folder, score="J"):
    """{name: Figure} of one run, without its data: the heat-map of R; the bars of its classes, or tasks; the trace of a task-free one that watched its loss."""
    figures = {f"heatmap_{score}": heatmap(results, score)}
    if results["method"] != "joint" and len(results["matrix"][score]) > 1:
        figures[f"{'classes' if has_classes(results, score) else 'tasks'}_{score}"] = bars(
            results, score
        )
    if results["protocol"] == "tfcl" and windows(folder):
        figures["trace"] = trace(results, folder)
    return figures


def heatmap(results, score="J"):
    """R: rows after a task, columns tasks; cells of tasks not learned yet are grey."""
    R = np.array(results["matrix"][score], float)
    wide = R.shape[1] > 8
    width = PAGE if wide else COLUMN
    figure, axes = panels(1, 1, width, 1.15 + 0.24 * len(R) + (0.2 if wide else 0))
    image = draw_heatmap(axes[0, 0], R, results["method"] == "joint", (width - 1.1) / R.shape[1])
    axes[0, 0].set_xticks(
        range(R.shape[1]),
        numbered(results["tasks"], 17),
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    figure.colorbar(image, ax=axes[0, 0], pad=0.02, aspect=30).outline.set_linewidth(0.4)
    figure.suptitle(f"{title_of(results)}\n{score} on test clips; grey: not learned yet")
    return figure


def draw_heatmap(ax, R, joint, cell):
    """Draw the matrix R [rows, tasks] into an axes: a coloured cell with its value where the task is learned, a grey one where it is not. `cell`: its width in inches."""
    rows, tasks = R.shape
    future = np.arange(tasks)[None] >= (np.arange(rows)[:, None] * (tasks if joint else 1))
    image = ax.imshow(
        np.ma.array(R, mask=future | np.isnan(R)), vmin=0, vmax=1, cmap="viridis", aspect="auto"
    )
    size = float(np.clip(72 * cell * 0.85 / 2.3, 3.2, 7))
    for i in range(rows):
        for j in range(tasks):
            if future[i, j]:
                ax.add_patch(
                    Rectangle(
                        (j - 0.5, i - 0.5), 1, 1, facecolor=GREY, edgecolor="white", linewidth=0.4
                    )
                )
            said = "–" if np.isnan(R[i, j]) else f"{R[i, j]:.2f}"
            ax.text(
                j,
                i,
                said,
                ha="center",
                va="center",
                fontsize=size,
                color="#606060" if future[i, j] else "white" if R[i, j] < 0.6 else "black",
            )
    ax.set_xticks(range(tasks), [str(j + 1) for j in range(tasks)], fontsize=min(6.5, 1.4 * size))
    ax.set_yticks(
        range(rows), ["none", "all"] if joint else ["none", *(str(k) for k in range(1, rows))]
    )
    ax.set_xlabel("task")
    ax.set_ylabel("after task")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return image


def bars(results, score="J"):
    """The score right after learning against the one after the last task: per class where `has_classes`, else per task."""
    if has_classes(results, score):
        C, names = results["class_matrix"]["J"], results["class_matrix"]["classes"]
        stage = {
            name: k for k, task in enumerate(results["tasks"], start=1) for name in task["classes"]
        }
        pairs = [
            (f"{stage[name]} {shortened(name, 22)}", C[stage[name]][c], C[-1][c])
            for c, name in enumerate(names)
            if stage[name] < len(C)
        ]
    else:
        R = results["matrix"][score]
        pairs = [
            (name, R[j + 1][j], R[-1][j])
            for j, name in enumerate(numbered(results["tasks"][: len(R) - 1], 22))
        ]
    names, first, last = zip(*pairs)
    y, shown = np.arange(len(pairs)), lambda values: np.nan_to_num(np.array(values, float))
    figure, axes = panels(1, 1, COLUMN, 0.95 + (0.2 if len(pairs) > 12 else 0.27) * len(pairs))
    ax = axes[0, 0]
    ax.barh(y - 0.2, shown(first), 0.38, color=SKY, label="right after learning it")
    ax.barh(y + 0.2, shown(last), 0.38, color=BLUE, label="after the last task")
    ax.set_yticks(y, names)
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel(
        f"{score} on test clips" + (", by task and class" if has_classes(results, score) else "")
    )
    ax.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title_of(results))
    return figure


def has_classes(results, score):
    """Whether results.json tells the score class by class, of classes that belong to a task: J, and not of MS3, of a stream, or of a run made before there was a class matrix."""
    return (
        score == "J"
        and bool(results.get("class_matrix"))
        and any(task["classes"] for task in results["tasks"])
    )


# ---- the consolidation trace -----------------------------------------------------------------------------------------


def windows(folder):
    """The loss windows of log.jsonl, [{"step", "mean", "std", "fired", "reason"}]; empty where the run watched none."""
    path = Path(folder, "log.jsonl")
    return (
        [
            line["window"]
            for line in map(json.loads, path.read_text().splitlines())
            if "window" in line
        ]
        if path.is_file()
        else []
    )


def trace(results, folder):
    """Task-free: the windows' loss, the consolidations that fired, the stream's true drifts underneath; over optimiser steps."""
    if results["protocol"] != "tfcl":
        raise AtlasError(
            f"{folder} is no task-free run (its protocol is {results['protocol']}), so it has no consolidation trace"
        )
    found = windows(folder)
    if not found:
        raise AtlasError(
            f"{folder}/log.jsonl holds no loss windows: method={results['method']} did not watch for plateaus; only lra with lra_trigger=plateau does"
        )
    steps, level, spread = (
        np.array([w[name] for w in found], float) for name in ("step", "mean", "std")
    )
    fired = [w["step"] for w in found if w["fired"]]
    figure, axes = panels(2, 1, PAGE, 2.3, sharex=True, height_ratios=[5, 1])
    top, bottom = axes[:, 0]
    top.fill_between(
        steps,
        level - spread,
        level + spread,
        color=SKY,
        alpha=0.35,
        linewidth=0,
        label="± standard deviation in the window",
    )
    top.plot(steps, level, "o-", color=BLUE, markersize=2.5, label="mean task loss of a window")
    for k, step in enumerate(fired):
        top.axvline(step, color=RED, linestyle="--", label=None if k else "consolidated")
    top.set_ylabel("loss")
    top.grid(axis="y")
    edges = [0, *results["drifts"], max(steps[-1], *results["drifts"], 1)]
    for k, (start, end) in enumerate(zip(edges, edges[1:])):
        bottom.axvspan(start, end, facecolor=GREY if k % 2 else "#F0F0F0", linewidth=0)
        if end - start > 0.03 * edges[-1]:
            bottom.text((start + end) / 2, 0.5, str(k + 1), ha="center", va="center")
    for k, step in enumerate(results["drifts"]):
        bottom.axvline(
            step, color=BLACK, linewidth=1.5, label=None if k else "true drift of the stream"
        )
    bottom.set_xlim(0, edges[-1])
    bottom.set_ylim(0, 1)
    bottom.set_yticks([])
    bottom.set_ylabel("segment", rotation=0, ha="right", va="center")
    bottom.set_xlabel("optimiser step")
    figure.legend(loc="outside lower center", ncols=4)
    figure.suptitle(
        f"{title_of(results)}: {len(fired)} consolidations, {len(results['drifts'])} true drifts"
    )
    return figure


# ---- several runs ----------------------------------------------------------------------------------------------------


def comparison_figures(runs):
    """{name: Figure}: for each problem (compare.problems) the three panels of `overview`, and side by side the heat-maps of up to four of its methods."""
    figures, found = {}, problems(runs)
    for problem in found:
        rows = [row for row in problem["rows"] if row["runs"]]
        if not rows:
            continue
        protocol = rows[0]["runs"][0]["protocol"]
        same = [
            other
            for other in found
            if other["title"].split(" · ")[0] == problem["title"].split(" · ")[0]
        ]
        name = protocol + (f"_{same.index(problem) + 1}" if len(same) > 1 else "")
        figures[f"compare_{name}"] = overview(problem["title"], rows)
        several = [row for row in rows if row["method"] != "joint"]
        if several:
            figures[f"heatmaps_{name}"] = heatmaps(problem["title"], several[:4])
    if not figures:
        raise AtlasError("none of these runs is finished, so there is nothing to draw")
    return figures


def looks(rows):
    """{label: (colour, marker)}: a method's is the same in every figure where it has one row."""
    taken = {row["label"]: FIRST[row["method"]] for row in rows if row["label"] in FIRST}
    free = (k for k in range(56) if k not in taken.values() and k % len(PALETTE) != 6)
    places = {
        row["label"]: taken[row["label"]] if row["label"] in taken else next(free)
        for row in rows
        if row["method"] != "joint"
    }
    found = {
        label: (PALETTE[k % len(PALETTE)], MARKERS[k % len(MARKERS)]) for label, k in places.items()
    }
    return found | {row["label"]: (BLACK, "*") for row in rows if row["method"] == "joint"}


def seeds_text(rows):
    counts = sorted({len(row["runs"]) for row in rows})
    return (
        f"{counts[0]} seed{'s' * (counts[-1] > 1)}"
        if len(counts) == 1
        else f"{counts[0]}–{counts[-1]} seeds"
    )


def spread(values):
    """(mean, standard deviation; 0 for one value)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def overview(title, rows):
    """Three panels with one legend: forward transfer against forgetting, final J by method, mean J over the tasks learned so far. Small points: seeds; bars and bands: ± std."""
    look = looks(rows)
    names = {row["label"]: f"{row['label']} ({seeds_text([row])})" for row in rows}
    columns = max(
        1, min(len(rows), int(PAGE / (0.55 + 0.055 * max(map(len, names.values())))))
    )  # of the legend, in inches
    lines = -(-len(rows) // columns)
    figure, axes = panels(1, 3, PAGE, 2.35 + 0.14 * lines)
    transfer, final, curves = axes[0]
    for k, row in enumerate(rows):
        colour, marker = look[row["label"]]
        J = [results["metrics"]["J"]["final"] for results in row["runs"]]
        centre, deviation = spread(J)
        offsets = 0.12 * (np.arange(len(J)) - (len(J) - 1) / 2) / max(1, len(J) - 1) * 2
        final.errorbar(
            k, centre, deviation, color=colour, marker=marker, capsize=3, markersize=5, zorder=3
        )
        final.plot(
            k + 0.28 + offsets, J, marker, color=colour, markersize=2.5, alpha=0.6, linestyle="none"
        )
        if row["method"] == "joint":
            curves.errorbar(
                len(row["runs"][0]["tasks"]),
                centre,
                deviation,
                color=colour,
                marker=marker,
                capsize=2,
                zorder=4,
                clip_on=False,
            )
            continue
        pairs = [
            (results["metrics"]["J"]["forgetting"], results["metrics"]["J"]["fwt"])
            for results in row["runs"]
        ]
        if all(None not in pair for pair in pairs):
            (x, dx), (y, dy) = (spread(values) for values in zip(*pairs))
            transfer.errorbar(
                x, y, dy, dx, color=colour, marker=marker, capsize=2, markersize=5, zorder=3
            )
            transfer.plot(
                *zip(*pairs), marker, color=colour, markersize=2.5, alpha=0.6, linestyle="none"
            )
        if len({len(results["tasks"]) for results in row["runs"]}) == 1:
            curve = np.array([learned_so_far(results) for results in row["runs"]])  # [seeds, tasks]
            steps, middle = np.arange(1, curve.shape[1] + 1), curve.mean(0)
            curves.plot(steps, middle, color=colour, marker=marker, markersize=3)
            if len(curve) > 1 and len(rows) <= BANDS:
                deviation = curve.std(0, ddof=1)
                curves.fill_between(
                    steps,
                    middle - deviation,
                    middle + deviation,
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
    transfer.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    transfer.set(
        xlabel="forgetting of J (less is better)",
        ylabel="forward transfer of J",
        title="transfer against forgetting",
    )
    final.set(
        xticks=[], xlim=(-0.6, len(rows) - 0.2), ylabel="J after the last task", title="final J"
    )
    curves.set(xlabel="tasks learned", ylabel="mean J over them", title="forgetting curve")
    curves.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for ax in axes[0]:
        ax.grid(axis="y" if ax is final else "both")
    handles = [
        Line2D(
            [],
            [],
            color=look[row["label"]][0],
            marker=look[row["label"]][1],
            label=names[row["label"]],
        )
        for row in rows
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.suptitle(
        f"{title} · {len(rows)} method{'s' * (len(rows) > 1)} · {seeds_text(rows)}, mean ± standard deviation"
    )
    return figure


def learned_so_far(results, score="J"):
    """After each task, the mean of R over the tasks learned so far, [T]."""
    R = np.array(results["matrix"][score], float)
    return np.array([np.nanmean(R[k, :k]) for k in range(1, len(R))])


def heatmaps(title, rows, score="J"):
    """The heat-maps of R of up to four rows side by side, each the mean over its seeds."""
    figure, axes = panels(1, len(rows), PAGE, 2.5, sharey=True)
    for ax, row in zip(axes[0], rows):
        R = np.mean([results["matrix"][score] for results in row["runs"]], axis=0)
        image = draw_heatmap(ax, R, False, (PAGE - 0.9) / len(rows) / R.shape[1])
        ax.set_title(f"{shortened(row['label'], 92 // len(rows))}\n{seeds_text([row])}")
    for ax in axes[0, 1:]:
        ax.set_ylabel("")
    figure.colorbar(image, ax=axes[0].tolist(), pad=0.01, aspect=30).outline.set_linewidth(0.4)
    figure.suptitle(f"{title} · {score} on test clips, mean over seeds; grey: not learned yet")
    return figure
