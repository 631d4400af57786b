"""Figures of runs: each function draws one Figure, and `save` writes it as .png and .pdf.

A figure is 3.3 in (a column) or 6.9 in (a page) wide. The colours are those of Okabe & Ito, and
viridis, which colour-blind readers tell apart.
"""

import io
import json
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from atlas.errors import AtlasError
from atlas.report.table import problems

COLUMN, PAGE = 3.3, 6.9  # inches
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
PALE, MIDDLE = "#D0D0D0", "#8C8C8C"  # cells not learned yet; methods that are not chosen
LOOKS = {"lra": (BLUE, "o"), "lra_plus": (ORANGE, "D"), "finetune": (RED, "s")}
LOOKS["joint"] = (BLACK, "X")
OTHERS = (GREEN, PURPLE, SKY)
MARKERS = "^v<>PdphH8"
FEW = 7  # so many rows are all in colour
NAME = 10  # height of a written name in pixels, at matplotlib's 100 to the inch
# where a name may stand beside its point, in pixels: right and left, nearest first
PLACES = [
    (side * across, up)
    for across in (7, 25, 50, 80)
    for up in (8, -8, 0, 18, -18, 28, -28, 40, -40, 55, -55)
    for side in (1, -1)
]
LARGEST_PNG = 300_000  # bytes
STYLE = {
    "backend": "Agg",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "figure.titlesize": 8,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
}


def new_figure(width, height):
    """An empty figure in the one style, headless; inches."""
    matplotlib.rcParams.update(matplotlib.rcParamsDefault | STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(rows, columns, width, height, **options):
    """(Figure, axes [rows, columns])."""
    figure = new_figure(width, height)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, folder, name):
    """Write NAME.png and NAME.pdf; their paths. A png that is too large loses resolution."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AtlasError(
            f"{folder} is a file, not a folder for figures; choose another --out"
        ) from None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once; it takes most of the time
    for dpi in (300, 200, 150, 120, 100, 80, 60):
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"optimize": True})
        if drawn.tell() < LARGEST_PNG:
            break
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    png.write_bytes(drawn.getvalue())
    figure.savefig(pdf, metadata={"CreationDate": None})  # no date: equal runs give equal files
    return [png, pdf]


def shortened(name, length):
    return name if len(name) <= length else name[: length - 1] + "…"


def numbered(tasks, length):
    """["1 NAME", ...], shortened; the segments of a stream are numbered already."""
    names = []
    for j, task in enumerate(tasks, start=1):
        stream = task["name"].startswith("segment")
        names.append(task["name"] if stream else f"{j} {shortened(task['name'], length)}")
    return names


def column_word(results):
    """What a column of R is called."""
    return "segment" if results["protocol"] == "tfcl" else "task"


def title_of(results):
    """Protocol, method and seed of one run."""
    rows = len(results["matrix"]["J"]) - 1
    said = "" if results["complete"] else f" · unfinished, {rows} learned"
    return f"{results['protocol'].upper()} · {results['method']} · seed {results['seed']}{said}"


def matrix_of(results, score):
    """R, [rows, tasks]; nan where a score is None or a row was not scored."""
    width = len(results["tasks"])
    rows = [row or [None] * width for row in results["matrix"][score]]
    return np.array(rows, float).reshape(-1, width)


# ---- one run ------------------------------------------------------------------------------------


def run_figures(results, folder, score="J"):
    """{name: Figure} of one run, from its files alone: the heat-map of R, the bars of its classes
    or tasks, and the trace of a stream that watched its loss."""
    rows = len(results["matrix"][score])
    if not rows:
        raise AtlasError(f"{folder} has no scores yet, so there is nothing to draw")
    figures = {f"heatmap_{score}": heatmap(results, score)}
    if results["method"] != "joint" and rows > 1:
        name = "classes" if has_classes(results, score) else "tasks"
        figures[f"{name}_{score}"] = bars(results, score)
    if found := windows(folder):
        figures["trace"] = trace(results, found)
    return figures


def heatmap(results, score="J"):
    """R: rows after a task, columns tasks; the cells of tasks not learned yet are grey."""
    R = matrix_of(results, score)
    width = PAGE if R.shape[1] > 8 else COLUMN
    figure, axes = panels(1, 1, width, max(2.0, 1.35 + 0.24 * len(R)))
    ax = axes[0, 0]
    image = draw_heatmap(ax, R, results, (width - 1.1) / R.shape[1])
    names = numbered(results["tasks"], 17)
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    figure.colorbar(image, ax=ax, pad=0.02, aspect=30).outline.set_linewidth(0.4)
    figure.suptitle(f"{title_of(results)}\n{score} on test clips; grey: not learned yet")
    return figure


def draw_heatmap(ax, R, results, cell, untold=True):
    """Draw R [rows, tasks] with its values into an axes. `cell`: the width of a cell in inches;
    `untold`: also write the values of tasks that are not learned yet."""
    rows, tasks = R.shape
    joint = results["method"] == "joint"
    learned = np.arange(rows) * (tasks if joint else 1)
    future = np.arange(tasks)[None] >= learned[:, None]
    hidden = np.ma.array(R, mask=future | np.isnan(R))
    image = ax.imshow(hidden, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    size = float(np.clip(26 * cell, 3.2, 7))
    for (i, j), value in np.ndenumerate(R):
        colour = "white" if value < 0.6 else "black"
        if future[i, j]:
            colour = "#606060"
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fc=PALE, ec="white", lw=0.4))
        if untold or not future[i, j]:
            said = "–" if np.isnan(value) else f"{value:.2f}"
            ax.text(j, i, said, ha="center", va="center", fontsize=size, color=colour)
    stream = column_word(results) == "segment"
    ax.set_xticks(range(tasks), [str(j + 1) for j in range(tasks)])
    ax.set_yticks(range(rows), ["none", "all"] if joint else ["none", *range(1, rows)])
    ax.set_xlabel(column_word(results))
    ax.set_ylabel("at checkpoint" if stream else "after task")
    ax.tick_params(length=0, labelsize=min(6.5, 1.4 * size))
    ax.spines[:].set_visible(False)
    return image


def bars(results, score="J"):
    """The score right after learning beside the one after the last task: of each class, where
    `has_classes`, else of each task."""
    pairs = []
    if by_class := has_classes(results, score):
        C = results["class_matrix"]["J"]
        place = {name: c for c, name in enumerate(results["class_matrix"]["classes"])}
        for k, task in enumerate(results["tasks"][: len(C) - 1], start=1):
            for name in task["classes"]:
                own, last = C[k] and C[k][place[name]], C[-1] and C[-1][place[name]]
                pairs.append((f"{k} {shortened(name, 22)}", own, last))
    else:
        R = matrix_of(results, score)
        names = numbered(results["tasks"][: len(R) - 1], 22)
        pairs = [(name, R[j + 1, j], R[-1, j]) for j, name in enumerate(names)]
    names, *values = zip(*pairs)
    own, last = np.nan_to_num(np.array(values, float))
    y = np.arange(len(pairs))
    figure, axes = panels(1, 1, COLUMN, 1.0 + (0.2 if len(pairs) > 12 else 0.27) * len(pairs))
    ax = axes[0, 0]
    ax.barh(y - 0.2, own, 0.38, color=SKY, label="right after learning it")
    ax.barh(y + 0.2, last, 0.38, color=BLUE, label="at the end")
    ax.set_yticks(y, names)
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel(f"{score} on test clips" + (", by task and class" if by_class else ""))
    ax.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title_of(results))
    return figure


def has_classes(results, score):
    """Whether the results hold the score of each class, and classes belong to tasks."""
    classes = any(task["classes"] for task in results["tasks"])
    return score == "J" and classes and bool(results.get("class_matrix"))


def windows(folder):
    """The loss windows of log.jsonl, [{"step", "mean", "std", "fired"}]; empty where none."""
    path = Path(folder, "log.jsonl")
    if not path.is_file():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line["window"] for line in lines if "window" in line]


def trace(results, found):
    """A stream: the loss of its windows, where it consolidated, and underneath the true drifts."""
    steps, level, spread = (
        np.array([window[name] for window in found], float) for name in ("step", "mean", "std")
    )
    fired = [window["step"] for window in found if window["fired"]]
    figure, axes = panels(2, 1, PAGE, 2.3, sharex=True, height_ratios=[5, 1])
    top, bottom = axes[:, 0]
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


# ---- several runs -------------------------------------------------------------------------------


def comparison_figures(runs, methods=(), score="J"):
    """{name: Figure}: of each problem (table.problems) the overview and the heat-maps.

    `methods`: names of methods or of rows, which are in colour and have heat-maps. Without, a few
    rows are in colour (all, where there are few), and all but joint have heat-maps.
    """
    figures, found = {}, problems(runs)
    known = set()
    for row in (row for problem in found for row in problem["rows"]):
        known |= {row["label"], row["method"]}
    if wrong := set(methods) - known:
        raise AtlasError(f"--methods: {wrong.pop()} is not among {', '.join(sorted(known))}")
    for problem in found:
        rows = [row for row in problem["rows"] if row["runs"]]
        if not rows:
            continue
        name = problem["title"].lower().replace(" · ", "_").replace("/", "_")
        asked = [row for row in rows if {row["label"], row["method"]} & set(methods)]
        figures[f"compare_{name}"] = overview(problem["title"], rows, asked, score)
        drawn = asked if methods else [row for row in rows if row["method"] != "joint"]
        if drawn:
            figures[f"heatmaps_{name}"] = heatmaps(problem["title"], drawn, score)
    if not figures:
        raise AtlasError("none of these runs is finished, so there is nothing to draw")
    return figures


def looks(rows, asked=()):
    """{label: (colour, marker)}. Rows that are not asked for are grey, where there are many."""
    if not asked:
        asked = rows if len(rows) <= FEW else [row for row in rows if row["label"] in LOOKS]
    found, others = {}, 0
    for k, row in enumerate(rows):
        if row not in asked:
            found[row["label"]] = (MIDDLE, MARKERS[k % len(MARKERS)])
        elif row["label"] in LOOKS:
            found[row["label"]] = LOOKS[row["label"]]
        else:
            found[row["label"]] = (OTHERS[others % len(OTHERS)], MARKERS[others % len(MARKERS)])
            others += 1
    return found


def seeds_text(rows):
    counts = sorted({len(row["runs"]) for row in rows})
    if len(counts) > 1:
        return f"{counts[0]}–{counts[-1]} seeds"
    return f"{counts[0]} seed{'s' if counts[0] > 1 else ''}"


def overview(title, rows, asked=(), score="J"):
    """Three panels, named at their rows and points: the final score of each method, the mean over
    the tasks learned so far, and forward transfer against forgetting."""
    look = looks(rows, asked)
    figure = new_figure(PAGE, max(3.6, 1.0 + 0.23 * len(rows)))
    axes = figure.subplot_mosaic(
        [["final", "curves"], ["final", "transfer"]], width_ratios=[1, 1.75]
    )
    draw_final(axes["final"], rows, look, score)
    ends = draw_curves(axes["curves"], rows, look, score)
    points = draw_transfer(axes["transfer"], rows, look, score)
    for ax in axes.values():
        ax.grid(axis="x" if ax is axes["final"] else "both")
    figure.suptitle(f"{title} · {seeds_text(rows)}, mean ± standard deviation")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the names below must not move the panels
    name_ends(axes["curves"], ends, look)
    name_points(axes["transfer"], points, look)
    return figure


def draw_final(ax, rows, look, score):
    """A line a method, the best on top: mean ± deviation, and small points for the seeds."""
    finals = {}
    for row in rows:
        finals[row["label"]] = [run["metrics"][score]["final"] for run in row["runs"]]
    order = sorted(finals, key=lambda label: mean(finals[label]))
    for y, label in enumerate(order):
        colour, marker = look[label]
        values = finals[label]
        spread = stdev(values) if len(values) > 1 else 0.0
        ax.errorbar(mean(values), y, xerr=spread, color=colour, marker=marker, capsize=2, ms=4.5)
        ax.plot(values, [y - 0.3] * len(values), ".", color=colour, ms=2.5, alpha=0.6)
    ax.set_yticks(range(len(order)), order)
    for tick, label in zip(ax.get_yticklabels(), order):
        tick.set_color(look[label][0])
    ax.set_ylim(-0.7, len(order) - 0.4)
    ax.set(xlabel=f"{score} on test clips at the end", title=f"final {score}")


def draw_curves(ax, rows, look, score):
    """The mean over the tasks learned so far, after each task; {label: (x, y) of its end}."""
    ends = {}
    for row in rows:
        colour, marker = look[row["label"]]
        tasks = len(row["runs"][0]["tasks"])
        front = 3 if colour != MIDDLE else 2
        if row["method"] == "joint":
            steps = [tasks]
            curve = [mean(run["metrics"][score]["final"] for run in row["runs"])]
        else:
            steps = range(1, tasks + 1)
            curve = np.mean([learned_so_far(run, score) for run in row["runs"]], axis=0)
        width = 1.4 if front == 3 else 0.8
        ax.plot(steps, curve, color=colour, marker=marker, ms=3, lw=width, zorder=front)
        ends[row["label"]] = (tasks, curve[-1])
    word = column_word(rows[0]["runs"][0])
    ax.set(xlabel=f"{word}s learned", ylabel=f"mean {score} over them", title="forgetting curve")
    ax.set_xlim(0.7, tasks * 1.35 + 0.6)
    ax.set_xticks(range(1, tasks + 1))
    return ends


def learned_so_far(results, score="J"):
    """After each task, the mean of R over the tasks learned so far, [tasks]."""
    R = matrix_of(results, score)
    return [np.nan if np.isnan(R[k]).all() else np.nanmean(R[k, :k]) for k in range(1, len(R))]


def draw_transfer(ax, rows, look, score):
    """Forward transfer against forgetting; {label: (x, y) of its point}."""
    points = {}
    for row in rows:
        found = [run["metrics"][score] for run in row["runs"]]
        pairs = [(one["forgetting"], one["fwt"]) for one in found]
        if any(None in pair for pair in pairs):
            continue
        colour, marker = look[row["label"]]
        x, y = np.mean(pairs, axis=0)
        dx, dy = np.std(pairs, axis=0, ddof=1) if len(pairs) > 1 else (0, 0)
        bars = {"elinewidth": 0.3} if colour == MIDDLE else {"elinewidth": 0.9, "zorder": 3}
        ax.errorbar(x, y, dy, dx, color=colour, marker=marker, ms=4.5, **bars)
        points[row["label"]] = (x, y)
    ax.set(
        xlabel=f"forgetting of {score} (less is better)",
        ylabel=f"forward transfer of {score}",
        title="forward transfer against forgetting",
    )
    return points


def name_ends(ax, ends, look):
    """Write the names at the right ends of curves, moved apart where they would touch."""
    labels = sorted(ends, key=lambda label: ends[label][1])
    heights = np.array([ax.transData.transform(ends[label])[1] for label in labels])
    up, down = heights.copy(), heights.copy()
    for k in range(1, len(labels)):
        up[k] = max(up[k], up[k - 1] + NAME)
        down[-k - 1] = min(down[-k - 1], down[-k] - NAME)
    bottom, top = ax.get_window_extent().intervaly
    room = NAME * (np.arange(len(labels)) + 0.5)
    places = np.clip((up + down) / 2, bottom + room, top + room - room[-1] - NAME / 2)
    right = ax.transData.transform((1.07 * ends[labels[0]][0] + 0.1, 0))[0]
    for label, height in zip(labels, places):
        write_name(ax, label, ends[label], (right, height), look[label][0])


def name_points(ax, points, look):
    """Write the names beside their points, each at the nearest place that is free."""
    pixels = {label: ax.transData.transform(point) for label, point in points.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in pixels.values()]
    page = ax.get_window_extent()
    for label in sorted(points, key=lambda label: look[label][0] == MIDDLE):  # the chosen first
        width = 0.55 * NAME * len(label)
        for across, up in PLACES:
            x, y = pixels[label] + (across - width * (across < 0), up)
            box = (x, y - NAME / 2, x + width, y + NAME / 2)
            inside = page.x0 < x and x + width < page.x1 and page.y0 < box[1] and box[3] < page.y1
            if inside and not any(overlap(box, other) for other in taken):
                break
        taken.append(box)
        write_name(ax, label, points[label], (x, y), look[label][0])


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def write_name(ax, label, point, pixels, colour):
    """Write a name with its left middle at `pixels`, and a thin line to its point."""
    place = ax.transData.inverted().transform(pixels)
    line = {"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 0, "shrinkB": 2}
    line["relpos"] = (float(place[0] < point[0]), 0.5)
    text = ax.annotate(label, point, place, color=colour, size=6, va="center", arrowprops=line)
    text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])


def heatmaps(title, rows, score="J"):
    """The heat-maps of R of the rows, at most four side by side, each the mean over its seeds."""
    across = min(4, len(rows))
    down = -(-len(rows) // across)
    tall = 0.62 + 0.17 * len(rows[0]["runs"][0]["matrix"][score])
    figure, axes = panels(down, across, PAGE, 0.4 + tall * down)
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    for ax, row in zip(axes.flat, rows):
        R = np.mean([matrix_of(run, score) for run in row["runs"]], axis=0)
        cell = (PAGE - 1.1) / across / R.shape[1]
        image = draw_heatmap(ax, R, row["runs"][0], cell, untold=False)
        ax.set_title(shortened(row["label"], 92 // across))
        if ax not in axes[:, 0]:
            ax.set_ylabel("")
        if ax not in axes[-1]:
            ax.set_xlabel("")
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), pad=0.01, aspect=40)
    bar.outline.set_linewidth(0.4)
    figure.suptitle(f"{title} · {score} on test clips, mean of {seeds_text(rows)}")
    return figure
