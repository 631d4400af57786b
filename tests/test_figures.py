"""Figures of one run, by matplotlib's objects, and how they are written. Pixels are for people."""

import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from test_table import TASKS, made

from atlas.errors import AtlasError
from atlas.report import figures


def heatmap(results):
    row = {"label": results["method"], "runs": [results]}
    return figures.heatmaps(figures.title_of(results), [row])


def inside(figure):
    """Nothing is cut off and nothing warns: all that is drawn lies on the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    box, page = figure.get_tightbbox(), figure.bbox_inches
    low = box.x0 >= -0.01 and box.y0 >= -0.01
    return low and box.x1 <= page.x1 + 0.01 and box.y1 <= page.y1 + 0.01


def grey_cells(ax):
    """The cells through which the ground of the axes is seen."""
    assert to_hex(ax.get_facecolor()) == figures.PALE.lower()
    return {(j, i) for i, j in zip(*np.nonzero(ax.images[0].get_array().mask))}


def test_the_heatmap_has_the_matrix_in_its_cells_and_the_future_in_grey():
    results = made(shift=0.013)
    figure = heatmap(results)
    ax = figure.axes[0]
    R = np.array(results["matrix"]["J"])
    written = {text.get_position(): text.get_text() for text in ax.texts}
    future = {(j, i) for i in range(4) for j in range(3) if j >= i}
    assert written == {(j, i): f"{R[i, j]:.2f}"[1:] for i in range(4) for j in range(3)}
    assert grey_cells(ax) == future
    shown = ax.images[0].get_array()
    assert np.allclose(shown.compressed(), R[~shown.mask])
    assert all(word in figure.get_suptitle() for word in ("CIL", "lra", "seed 0", "J on test"))
    assert ax.get_xlabel() == "task" and inside(figure)


def test_the_heatmap_of_a_joint_run_has_two_rows():
    ax = heatmap(made("joint")).axes[0]
    assert len(ax.texts) == 6 and grey_cells(ax) == {(j, 0) for j in range(3)}


def test_what_was_not_scored_is_a_dash():
    results = made()
    results["matrix"]["J"][3][0] = None
    results["matrix"]["J"][2] = None
    texts = [text.get_text() for text in heatmap(results).axes[0].texts]
    assert texts.count("–") == 4


def test_a_stream_has_segments_and_checkpoints():
    ax = heatmap(made(protocol="tfcl")).axes[0]
    assert ax.get_xlabel() == "segment" and ax.get_ylabel() == "at checkpoint"


def test_an_unfinished_a_long_and_an_empty_run():
    begun = made(complete=False)
    begun["matrix"]["J"] = begun["matrix"]["J"][:1]
    figure = heatmap(begun)
    assert "unfinished" in figure.get_suptitle() and inside(figure)
    long = made(tasks=[TASKS[0] | {"name": f"task{j}"} for j in range(20)])
    long["matrix"]["J"] = np.random.default_rng(0).random((21, 20)).tolist()
    assert inside(heatmap(long))
    begun["matrix"]["J"] = []
    with pytest.raises(AtlasError, match="no scores yet"):
        heatmap(begun)


def test_a_figure_is_written_in_true_colour_and_as_pdf(tmp_path):
    png, pdf = figures.save(heatmap(made()), tmp_path / "figures", "R")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert Image.open(png).width == 200 * figures.COLUMN
    assert Image.open(png).mode in ("RGB", "RGBA")
    with pytest.raises(FileExistsError):  # one_line_errors says what to do
        figures.save(heatmap(made()), png, "x")
