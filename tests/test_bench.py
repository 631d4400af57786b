import json
import math

import pytest
import torch
from conftest import run

from atlas.errors import AtlasError
from atlas.metrics import MaskMeter
from atlas.report import bench


def test_quick_yields_every_line(tmp_path):
    """Runs, and every figure is finite; nothing is said about times."""
    done = run("bench.py", "--quick", "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {name for name in found if not name.startswith("gpu")} == set(bench.LINES) - {"gpu"}
    for name, line in found.items():
        assert (
            line["name"] == name
            and ("ratio" in line) != ("share" in line)
            and {"median", "min", "max", "runs"} <= line.keys()
        )
        assert all(
            math.isfinite(value) for value in line.values() if isinstance(value, (int, float))
        )
        assert line["min"] <= line["median"] <= line["max"]
    assert found["loader"]["decoded_once"] and found["loader"]["decoded_again"] == 0
    assert found["metrics"]["difference"] < 1e-6 and found["step"]["difference"] < 1e-4
    assert found["penalty"]["bytes_after_2"] == found["penalty"]["bytes_after_20"]


def test_the_plain_scores_are_MaskMeters():
    g = torch.Generator().manual_seed(0)
    logits, masks = (
        3 * torch.randn(3, 5, 16, 16, generator=g),
        torch.rand(3, 5, 16, 16, generator=g) < 0.3,
    )
    masks[0, 1] = False  # a silent frame
    masks[2] = False  # a silent clip
    meter = MaskMeter()
    meter.update(logits, masks, torch.ones(3, 5, dtype=torch.bool))
    ours, plain = meter.compute(), bench.plain_scores(logits, masks)
    assert plain == pytest.approx({name: ours[name] for name in plain}, abs=1e-6)


def test_pairs_are_told_as_medians():
    line = bench.figures("a", "ratio", [(1.0, 4.0), (1.0, 2.0), (2.0, 6.0)])
    assert (line["ratio"], line["min"], line["max"], line["runs"], line["ours"], line["plain"]) == (
        3.0,
        2.0,
        4.0,
        3,
        1.0,
        4.0,
    )
    assert bench.figures("b", "share", [(1.0, 4.0)], faster=False)["share"] == 0.25


def test_bad_input(tmp_path):
    for words in (["--run", str(tmp_path)], ["--pairs", "0"]):
        with pytest.raises(AtlasError, match=str(tmp_path) if "--run" in words else "--pairs 0"):
            bench.main(bench.arguments(words))


def test_the_table_by_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench,
        "read_results",
        lambda folder: {
            "seconds": {"train": [3.0, 2.0], "consolidate": [1.0], "evaluate": [2.0, 1.0, 1.0]}
        },
    )
    table = bench.phases(tmp_path)
    assert "| train | 5.0 | 50 % | 3.0, 2.0 |" in table and "| together | 10.0 |" in table
