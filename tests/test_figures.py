"""Figures: what is in them, through matplotlib's objects, and that they are written. Pixels are for people."""

import json
import sys
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from test_compare import TASKS, made

import eval as script
from atlas.errors import AtlasError
from atlas.report import figures


def labels(figure):
    return [entry.get_text() for legend in figure.legends for entry in legend.get_texts()]


def inside(figure):
    """Nothing is cut off: all that is drawn lies on the page (constrained layout has moved it there)."""
    figure.draw_without_rendering()
    box, page = figure.get_tightbbox(), figure.bbox_inches
    return (
        box.x0 >= -0.01
        and box.y0 >= -0.01
        and box.x1 <= page.x1 + 0.01
        and box.y1 <= page.y1 + 0.01
    )


@pytest.mark.parametrize("score", ("J", "F"))
def test_the_heatmap_has_the_matrix_in_its_cells_and_the_future_in_grey(score):
    results = made(shift=0.013)
    figure = figures.heatmap(results, score)
    ax, _bar = figure.axes
    R = np.array(results["matrix"][score])
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {(j, i): f"{R[i, j]:.2f}" for i in range(4) for j in range(3)}
    grey = {
        (round(p.get_x() + 0.5), round(p.get_y() + 0.5))
        for p in ax.patches
        if to_hex(p.get_facecolor()) == figures.GREY.lower()
    }
    assert grey == {(j, i) for i in range(4) for j in range(3) if j >= i}
    shown = ax.images[0].get_array()
    assert (shown.mask == (np.arange(3)[None] >= np.arange(4)[:, None])).all() and np.allclose(
        shown.compressed(), R[~shown.mask]
    )
    assert all(
        word in figure.get_suptitle() for word in ("CIL", "lra", "1 seed", score)
    ) and inside(figure)


def test_the_heatmap_of_a_joint_run_has_two_rows_and_an_undefined_score_is_a_dash():
    figure = figures.heatmap(made("joint"))
    assert (
        len(figure.axes[0].texts) == 6
        and sum(to_hex(p.get_facecolor()) == figures.GREY.lower() for p in figure.axes[0].patches)
        == 3
    )
    results = made()
    results["matrix"]["F"][3][0] = None
    assert "–" in [text.get_text() for text in figures.heatmap(results, "F").axes[0].texts]


def test_bars_are_the_diagonal_and_the_last_row():
    figure = figures.bars(made())  # of a run without a class matrix: older, or MS3
    first, last = ([bar.get_width() for bar in bars] for bars in figure.axes[0].containers)
    assert first == pytest.approx([0.6, 0.6, 0.6]) and last == pytest.approx([0.4, 0.5, 0.6])
    assert (
        labels(figure) == ["right after learning it", "after the last task"]
        and "1 seed" in figure.get_suptitle()
        and inside(figure)
    )


def test_every_class_has_a_pair_of_bars_from_its_own_task_and_the_last(tmp_path):
    tasks = [
        task | {"classes": names} for task, names in zip(TASKS, (["a", "b"], ["c"], ["d", "e"]))
    ]
    J = np.random.default_rng(0).random((4, 5)).tolist()
    J[3][1] = None  # a class without a test clip
    results = made(tasks=tasks) | {"class_matrix": {"classes": list("abcde"), "J": J}}
    assert list(figures.run_figures(results, tmp_path)) == ["heatmap_J", "classes_J"] and list(
        figures.run_figures(results, tmp_path, "F")
    ) == ["heatmap_F", "tasks_F"]
    figure = figures.bars(results)
    first, last = ([bar.get_width() for bar in bars] for bars in figure.axes[0].containers)
    assert first == pytest.approx(
        [J[1][0], J[1][1], J[2][2], J[3][3], J[3][4]]
    ) and last == pytest.approx([J[3][0], 0, *J[3][2:]])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "1 a",
        "1 b",
        "2 c",
        "3 d",
        "3 e",
    ] and inside(figure)
    begun = results | {
        "complete": False,
        "class_matrix": {"classes": list("abcde"), "J": J[:3]},
        "matrix": {"J": results["matrix"]["J"][:3]},
    }
    assert len(figures.bars(begun).axes[0].containers[0]) == 3 and inside(
        figures.bars(begun)
    )  # of the classes learned so far
    stream = made(tasks=[task | {"classes": []} for task in TASKS]) | {
        "class_matrix": results["class_matrix"]
    }
    for other in (stream, results | {"class_matrix": None}):
        assert list(figures.run_figures(other, tmp_path)) == ["heatmap_J", "tasks_J"]


def test_the_figures_of_a_joint_an_unfinished_and_a_long_run(tmp_path):
    assert list(figures.run_figures(made("joint"), tmp_path)) == ["heatmap_J"] and list(
        figures.run_figures(made(), tmp_path, "F")
    ) == ["heatmap_F", "tasks_F"]
    started = made(complete=False)
    started["matrix"]["J"] = started["matrix"]["J"][:2]
    drawn = figures.run_figures(started, tmp_path)
    assert (
        len(drawn["heatmap_J"].axes[0].texts) == 6
        and len(drawn["tasks_J"].axes[0].containers[0]) == 1
        and "unfinished" in drawn["tasks_J"].get_suptitle()
    )
    long = made(tasks=[TASKS[0] | {"name": f"a_rather_long_class_name_{j}+1"} for j in range(20)])
    long["matrix"]["J"] = np.random.default_rng(0).random((21, 20)).tolist()
    assert all(inside(figure) for figure in figures.run_figures(long, tmp_path).values())


def test_the_comparison_has_three_panels_one_legend_and_every_seed():
    runs = [made(m, s, 0.01 * s) for m in ("lra", "finetune", "joint") for s in range(3)]
    drawn = figures.comparison_figures(runs)
    assert list(drawn) == ["compare_cil", "heatmaps_cil"]
    figure = drawn["compare_cil"]
    assert (
        len(figure.axes) == 3
        and len(figure.legends) == 1
        and not any(ax.get_legend() for ax in figure.axes)
    )
    assert (
        labels(figure) == ["lra (3 seeds)", "finetune (3 seeds)", "joint (3 seeds)"]
        and "3 methods · 3 seeds" in figure.get_suptitle()
    )
    points = sorted(
        y for line in figure.axes[1].lines if len(line.get_ydata()) == 3 for y in line.get_ydata()
    )
    assert points == pytest.approx(sorted(r["metrics"]["J"]["final"] for r in runs))
    assert (
        len(figure.axes[1].containers) == 3 and len(figure.axes[0].containers) == 2
    )  # with error bars; joint has no transfer
    curves = [line.get_ydata() for line in figure.axes[2].lines if len(line.get_xdata()) == 3]
    assert len(curves) == 2 and curves[0] == pytest.approx([0.61, 0.56, 0.51])
    maps = drawn["heatmaps_cil"]
    assert len(maps.axes) == 3 and [ax.get_title() for ax in maps.axes[:2]] == [
        "lra\n3 seeds",
        "finetune\n3 seeds",
    ]
    assert (
        maps.axes[0].images[0].get_array()[3, 2] == pytest.approx(0.61)
        and inside(figure)
        and inside(maps)
    )


def test_at_most_four_heatmaps_a_figure_a_problem_and_looks_that_stay():
    runs = [made(lra_lambda=value) for value in (0.1, 0.3, 1.0, 3.0, 10.0)] + [made(protocol="til")]
    drawn = figures.comparison_figures(runs)
    assert (
        set(drawn) == {"compare_cil", "heatmaps_cil", "compare_til", "heatmaps_til"}
        and len(drawn["heatmaps_cil"].axes) == 5
    )
    assert all(inside(figure) for figure in drawn.values())
    rows = [{"label": m, "method": m} for m in ("ewc", "finetune", "joint", "mas", "lra")]
    assert (
        figures.looks(rows)["lra"] == figures.looks(rows[-1:])["lra"]
        and len(set(figures.looks(rows).values())) == 5
    )
    with pytest.raises(AtlasError, match="none of these runs is finished"):
        figures.comparison_figures([made(complete=False)])


def test_the_trace_shows_windows_consolidations_and_drifts(tmp_path):
    fired = (8, 16)
    found = [
        {"step": s, "mean": 1 / s, "std": 0.1, "fired": s in fired, "reason": ""}
        for s in range(4, 25, 4)
    ]
    lines = [{"task": 1, "epoch": 1, "window": w} for w in found] + [
        {"task": 1, "consolidated": {}}
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = made(protocol="tfcl") | {"drifts": [8, 16]}
    assert "trace" in figures.run_figures(results, tmp_path)
    figure = figures.trace(results, tmp_path)
    top, bottom = figure.axes
    marks = lambda ax: [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert marks(top) == [8, 16] == marks(bottom) and [
        text.get_text() for text in bottom.texts
    ] == ["1", "2", "3"]
    assert (
        np.allclose(top.lines[0].get_ydata(), [w["mean"] for w in found])
        and "2 consolidations, 2 true drifts" in figure.get_suptitle()
        and inside(figure)
    )
    with pytest.raises(AtlasError, match="no task-free run"):
        figures.trace(made(), tmp_path)
    with pytest.raises(AtlasError, match="no loss windows"):
        figures.trace(made("finetune", protocol="tfcl"), tmp_path / "nowhere")


def test_a_figure_is_written_as_png_and_pdf_and_a_large_png_is_made_small(tmp_path):
    figure, axes = figures.panels(1, 1, figures.COLUMN, figures.COLUMN)
    axes[0, 0].imshow(np.random.default_rng(0).random((200, 200, 3)))
    png, pdf = figures.save(figure, tmp_path / "figures", "noise")
    assert png.stat().st_size < figures.LARGEST_PNG and pdf.read_bytes().startswith(b"%PDF")
    png, _ = figures.save(figures.heatmap(made()), tmp_path, "R")
    assert (
        Image.open(png).convert("L").getextrema() == (0, 255)
        and png.stat().st_size < figures.LARGEST_PNG
    )
    with pytest.raises(AtlasError, match="not a folder"):
        figures.save(figure, png, "x")


def evaluate(*words):
    """eval.py in this process (torch takes seconds to load)."""
    with patch.object(sys, "argv", ["eval.py", *map(str, words)]):
        return script.main(script.parse())


def test_the_commands(til_run, tmp_path, capsys):
    names = ["heatmap_J", "classes_J", "masks"]
    assert evaluate(til_run, "--figures") == 0
    assert sorted(p.name for p in (til_run / "figures").iterdir()) == sorted(
        f"{n}.{end}" for n in names for end in ("png", "pdf")
    )
    for seed in (0, 1):
        (tmp_path / f"finetune{seed}").mkdir()
        results = json.loads((til_run / "results.json").read_text()) | {
            "method": "finetune",
            "seed": seed,
        }
        (tmp_path / f"finetune{seed}" / "results.json").write_text(json.dumps(results))
    several = [til_run, tmp_path / "finetune0", tmp_path / "finetune1"]
    assert evaluate(*several, "--figures", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (
        tmp_path / "out" / "comparison.md"
    ).read_text() in printed and "| finetune | 2 |" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "comparison.md",
        *(f"{n}_til.{end}" for n in ("compare", "heatmaps") for end in ("png", "pdf")),
    }
    with pytest.raises(AtlasError, match="--out"):
        evaluate(*several, "--figures")
    with pytest.raises(AtlasError, match="for one run"):
        evaluate(*several, "--rescore")
    assert (
        evaluate(several[1], "--figures", "--score", "F") == 0
        and "no masks drawn" in capsys.readouterr().out
    )
    with pytest.raises(AtlasError, match="config.yaml"):
        evaluate(several[1], "--figures", "--clips", "x")
