"""Figures of several runs: the methods of a problem side by side, named at their rows and points.
A few methods are in colour, the others grey."""

import itertools
from statistics import mean, stdev

import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from atlas.errors import AtlasError
from atlas.report import figures as F
from atlas.report.table import problems

GREY = "#8C8C8C"  # methods that are not chosen
COLOURS = {"lra": F.BLUE, "lra_plus": F.ORANGE, "finetune": F.RED, "joint": F.BLACK}
OTHERS = (F.GREEN, F.PURPLE, F.SKY)
MARKERS = "os^Dv<>XPdphH8"
FEW = 8  # so many rows are all in colour
NAME = 10  # height of a written name in pixels, at matplotlib's 100 to the inch
# where a name may stand beside its point, in pixels: right and left, nearest first
UP = (8, -8, 0, 18, -18, 28, -28, 40, -40, 55, -55)
PLACES = [(side * across, up) for across in (7, 25, 50, 80) for up in UP for side in (1, -1)]


def comparison_figures(runs, methods=()):
    """{name: Figure}: of each problem (table.problems) the overview and the heat-maps.

    methods: names of methods or rows, which are in colour and have heat-maps. Without, a few rows
    are in colour, and all but joint have heat-maps.
    """
    figures, found = {}, problems(runs)
    known = {row[name] for p in found for row in p["rows"] for name in ("label", "method")}
    if wrong := set(methods) - known:
        raise AtlasError(f"--methods: {wrong.pop()} is not among {', '.join(sorted(known))}")
    for problem in found:
        rows = [row for row in problem["rows"] if row["runs"] and None not in finals(row)]
        asked = [row for row in rows if {row["label"], row["method"]} & set(methods)]
        drawn = asked if methods else [row for row in rows if row["method"] != "joint"]
        for row in rows:
            row["label"] = F.shortened(row["label"], 34)
        name = problem["title"].lower().replace(" · ", "_").replace("/", "_")
        if rows:
            figures[f"compare_{name}"] = overview(problem["title"], rows, asked)
        if drawn:
            title = f"{problem['title']} · mean of {seeds_text(drawn)}"
            figures[f"heatmaps_{name}"] = F.heatmaps(title, drawn)
    if not figures:
        raise AtlasError("none of these runs is finished, so there is nothing to draw")
    return figures


def finals(row):
    return [run["metrics"]["J"]["final"] for run in row["runs"]]


def looks(rows, asked=()):
    """{label: (colour, marker)}. Rows that are not asked for are grey, where there are many."""
    if not asked:
        asked = rows if len(rows) <= FEW else [row for row in rows if row["method"] in COLOURS]
    others, own, found = itertools.cycle(OTHERS), dict(COLOURS), {}
    for row, marker in zip(rows, itertools.cycle(MARKERS)):
        if row in asked and row["method"] not in own:
            own[row["method"]] = next(others)
        found[row["label"]] = own[row["method"]] if row in asked else GREY, marker
    return found


def seeds_text(rows):
    counts = {len(row["runs"]) for row in rows}
    return f"{'–'.join(map(str, sorted(counts)))} seed{'s' if counts != {1} else ''}"


def overview(title, rows, asked=()):
    """The final score of each row, beside what it learns and transfers against what it forgets."""
    look = looks(rows, asked)
    figure = F.new_figure(F.PAGE, max(2.6, 1.0 + 0.2 * len(rows)))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.75])
    draw_final(left, rows, look)
    points = draw_frontier(right, rows, look)
    figure.suptitle(f"{title} · {seeds_text(rows)}, mean ± standard deviation")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the names below must not move the panels
    name_points(right, points, look)
    return figure


def draw_final(ax, rows, look):
    """A line a method, the best on top: mean ± deviation, and small points for the seeds."""
    rows = sorted(rows, key=lambda row: mean(finals(row)))
    for y, row in enumerate(rows):
        colour, marker = look[row["label"]]
        values = finals(row)
        spread = stdev(values) if len(values) > 1 else 0.0
        ax.errorbar(mean(values), y, xerr=spread, color=colour, marker=marker, capsize=2, ms=4.5)
        ax.plot(values, [y - 0.3] * len(values), ".", color=colour, ms=2.5, alpha=0.6)
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    for tick, row in zip(ax.get_yticklabels(), rows):
        tick.set_color(look[row["label"]][0])
    ax.set(ylim=(-0.7, len(rows) - 0.4), xlabel="J on test clips at the end", title="final J")
    ax.grid(axis="x")


def draw_frontier(ax, rows, look):
    """Forward transfer against forgetting; {label: (x, y) of its point}. The rows of a method, such
    as its rates, make a line: a frontier, with learning in the place of transfer."""
    several = len({row["method"] for row in rows}) < len(rows)
    rise, said = ("learning", "J when learned") if several else ("fwt", "forward transfer of J")
    points, lines = {}, {}
    for row in rows:
        found = [run["metrics"]["J"] for run in row["runs"]]
        pairs = [(one["forgetting"], one[rise]) for one in found]
        if any(None in pair for pair in pairs):
            continue
        colour, marker = look[row["label"]]
        x, y = points[row["label"]] = np.mean(pairs, axis=0)
        lines.setdefault((row["method"], colour), []).append((x, y))
        dx, dy = np.std(pairs, axis=0, ddof=1) if len(pairs) > 1 else (0, 0)
        bars = {"elinewidth": 0.3} if colour == GREY else {"elinewidth": 0.9, "zorder": 3}
        ax.errorbar(x, y, dy, dx, color=colour, marker=marker, ms=4.5, **bars)
    for (_, colour), line in lines.items():
        ax.plot(*zip(*sorted(line)), color=colour, lw=0.8)
    ax.set(xlabel="forgetting of J (less is better)", ylabel=said)
    ax.set_title(f"{'learning' if several else 'forward transfer'} against forgetting")
    ax.grid()
    return points


def name_points(ax, points, look):
    """Write the names beside their points, each at the nearest free place, with a thin line."""
    pixels = {label: ax.transData.transform(point) for label, point in points.items()}
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in pixels.values()]
    page = ax.get_window_extent()
    for label in sorted(points, key=lambda label: look[label][0] == GREY):  # the chosen first
        width = 0.55 * NAME * len(label)
        for across, up in PLACES:
            x, y = pixels[label] + (across - width * (across < 0), up)
            box = Bbox.from_bounds(x, y - NAME / 2, width, NAME)
            inside = page.contains(*box.min) and page.contains(*box.max)
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        place = ax.transData.inverted().transform((x, y))
        line = {"arrowstyle": "-", "color": look[label][0], "lw": 0.4, "shrinkA": 0}
        line["relpos"] = (float(across < 0), 0.5)
        style = {"color": look[label][0], "size": 6, "va": "center", "arrowprops": line}
        text = ax.annotate(label, points[label], place, **style)
        text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
