import json
import math

import pytest
import torch
from conftest import ROOT

from atlas.metrics import MaskMeter
from atlas.report import bench


def test_quick_yields_every_line(tmp_path, capsys):
    """Every line runs, and every figure is finite; nothing is said about times."""
    words = ["--scale", "quick", "--json", str(tmp_path / "bench.json"), "--only"]
    lines = [name for name in bench.LINES if name != "gpu"]
    bench.main(bench.arguments([*words, *lines]))
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found) == lines
    table = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")][2:]
    assert [row.split()[1] for row in table] == lines
    for name, line in found.items():
        numbers = [value for value in line.values() if not isinstance(value, str)]
        assert all(map(math.isfinite, numbers))
        assert line["min"] <= line["median"] <= line["max"] and line["runs"] == 2
        kind = {"penalty": "share", "observe": "share", "sensitivity": "cost", "evaluation": "cost"}
        assert line["kind"] == kind.get(name, "ratio")
    assert not (ROOT / "runs" / "bench").exists()


def test_the_plain_step_has_the_gradients_of_ours(tmp_path):
    small = bench.Bench(tmp_path, "quick", clips=2)
    found = []
    for way in bench.bench_step(small)[1:]:
        way()
        found.append(torch.cat([p.grad.flatten() for p in small.updates.parameters]))
    assert (found[1] - found[0]).norm() < 1e-4 * found[0].norm()


def test_the_plain_F_is_MaskMeters():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, 16, 16, generator=g)
    masks = torch.rand(3, 5, 16, 16, generator=g) < 0.3
    masks[0, 1] = False  # a silent frame
    masks[2] = False  # a silent clip
    meter = MaskMeter()
    meter.update(logits, masks, torch.ones(3, 5, dtype=torch.bool))
    assert bench.plain_F(logits, masks) == pytest.approx(meter.compute()["F"], abs=1e-6)


def test_pairs_are_told_as_medians(monkeypatch):
    """ours takes 1, 1, 2 seconds, and the plain way 4, 2, 6."""
    times = {"ours": [1.0, 1.0, 2.0], "plain": [4.0, 2.0, 6.0]}
    ways = {"ours": lambda: None, "plain": lambda: None}

    def compared(kind):
        left = {ways[side]: iter(values) for side, values in times.items()}
        monkeypatch.setattr(bench, "seconds", lambda work, repeat=1: next(left[work]))
        return bench.compared(3, kind, ways["ours"], ways["plain"])

    line = compared("ratio")
    assert (line["median"], line["min"], line["max"], line["runs"]) == (3.0, 2.0, 4.0, 3)
    assert (line["ours"], line["plain"]) == (1.0, 4.0)
    assert compared("share")["median"] == compared("cost")["median"] == 1 / 3
    assert "| 33.33 % | 25.00 % to 50.00 % |" in bench.row("a", compared("share"))


def test_help_and_a_wrong_line(capsys):
    for words, code in (["--help"], 0), (["--only", "speed"], 2):
        with pytest.raises(SystemExit) as ended:
            bench.arguments(words)
        assert ended.value.code == code
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
