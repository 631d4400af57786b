"""Figures of several runs: who is in colour, what is named, what is drawn."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from test_figures import inside
from test_table import TASKS, made

from atlas.errors import AtlasError
from atlas.methods import METHODS
from atlas.report.overview import GREY, comparison_figures, looks


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title() == title)


def names(ax):
    return {text.get_text() for text in ax.texts}


def test_the_panels_hold_every_method_and_seed():
    runs = [made(m, s, 0.01 * s) for m in ("lra", "finetune", "joint") for s in range(3)]
    drawn = comparison_figures(runs)
    assert list(drawn) == ["compare_cil", "heatmaps_cil"]
    figure = drawn["compare_cil"]
    final = panel(figure, "final J")
    transfer = panel(figure, "forward transfer against forgetting")
    written = [text.get_text() for text in final.get_yticklabels()]
    assert written == ["lra", "finetune", "joint"]  # from the worst to the best
    assert names(transfer) == {"lra", "finetune"}
    points = [line.get_xdata() for line in final.lines if len(line.get_xdata()) == 3]
    seeds = np.sort(np.concatenate(points))
    assert seeds == pytest.approx(sorted(r["metrics"]["J"]["final"] for r in runs))
    assert not figure.legends and "3 seeds" in figure.get_suptitle() and inside(figure)


def test_all_methods_are_legible_in_one_figure():
    methods = list(METHODS)
    runs = []
    for k, method in enumerate(methods):
        runs += [made(method, seed, 0.001 * k + 0.01 * seed) for seed in range(2)]
    figure = comparison_figures(runs)["compare_cil"]
    assert inside(figure)
    points = panel(figure, "forward transfer against forgetting")
    boxes = [Text.get_window_extent(text) for text in points.texts]
    for k, box in enumerate(boxes):
        for other in boxes[:k]:
            x = min(box.x1, other.x1) - max(box.x0, other.x0)
            y = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert x < 1 or y < 3  # names touch at most at their rims
    colours = {
        t.get_text(): to_hex(t.get_color()) for t in panel(figure, "final J").get_yticklabels()
    }
    coloured = {name for name, colour in colours.items() if colour != GREY.lower()}
    assert coloured == {"lra", "lra_plus", "finetune", "joint"} and len(colours) == len(methods)


def test_the_methods_that_are_asked_for_are_in_colour_and_have_heatmaps():
    methods = ("lra", "finetune", "ewc", "mas", "si", "lwf", "olora", "frozen", "joint")
    runs = [made(method) for method in methods] + [made("ewc", lra_lambda=3.0)]
    drawn = comparison_figures(runs, ["ewc", "joint"])
    titles = [ax.get_title() for ax in drawn["heatmaps_cil"].axes if ax.get_title()]
    assert titles == ["ewc", "ewc lra_lambda=3.0", "joint"]
    everyone = comparison_figures(runs)["heatmaps_cil"]
    titles = [ax.get_title() for ax in everyone.axes if ax.get_title()]
    assert len(titles) == 9 and "joint" not in titles and inside(everyone)
    with pytest.raises(AtlasError, match="--methods: ewx is not among ewc, "):
        comparison_figures(runs, ["ewx"])


def test_looks_stay_and_tell_methods_apart():
    rows = [{"label": m, "method": m} for m in ("ewc", "finetune", "joint", "mas", "lra", "si")]
    found = looks(rows)
    assert found["lra"][0] == looks(rows[4:5])["lra"][0] and len(set(found.values())) == 6
    asked = looks(rows, [rows[0]])
    assert asked["ewc"][0] != GREY and asked["lra"][0] == GREY


def test_a_heatmap_is_the_mean_over_seeds():
    runs = [made("lra", s, 0.01 * s) for s in range(3)]
    ax = comparison_figures(runs)["heatmaps_cil"].axes[0]
    assert ax.images[0].get_array()[3, 2] == pytest.approx(0.61)


def test_each_problem_has_its_figures():
    runs = [made(), made(protocol="til"), made(protocol="tfcl"), made(step=2)]
    drawn = comparison_figures(runs)
    kinds = {"til", "tfcl", "cil_step=1", "cil_step=2"}
    assert {name.partition("_")[2] for name in drawn} == kinds
    with pytest.raises(AtlasError, match="none of these runs is finished"):
        comparison_figures([made(complete=False)])


def test_rows_that_were_not_scored_leave_gaps():
    results = made(tasks=TASKS)
    results["matrix"]["J"][2] = None
    results["metrics"]["J"] |= {"forgetting": None, "fwt": None}
    drawn = comparison_figures([results])
    assert all(inside(figure) for figure in drawn.values())


def test_the_rates_of_a_method_make_a_frontier_of_learning_against_forgetting():
    runs = [made("finetune", 0, 0.02 * k, lr=rate) for k, rate in enumerate((1e-4, 1e-3))]
    figure = comparison_figures([*runs, made("lra")])["compare_cil"]
    frontier = panel(figure, "learning against forgetting")
    wanted = [[run["metrics"]["J"][name] for run in runs] for name in ("forgetting", "learning")]
    lines = [sorted(map(tuple, line.get_xydata())) for line in frontier.lines]
    assert any(np.allclose(line, sorted(zip(*wanted))) for line in lines if len(line) == 2)
    assert names(frontier) == {"finetune lr=0.0001", "finetune", "lra"}
