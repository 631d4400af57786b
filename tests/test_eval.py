"""eval.py in this process, on a tiny TIL run and on files of results."""

import json

import pytest
from conftest import ROOT
from test_table import made

import eval as script
from atlas.errors import AtlasError
from atlas.report.packed import read_runs
from atlas.report.summary import summary
from atlas.report.table import brief, comparison
from atlas.results import read_results

TABLES = ROOT / "docs" / "results"


def evaluate(*words):
    return script.main(script.parse([str(word) for word in words]))


def written(folder, results):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_one_run_is_summed_up_and_several_are_compared(til_run, capsys):
    assert evaluate(til_run) == 0
    assert capsys.readouterr().out == summary(read_results(til_run)) + "\n"
    assert evaluate(TABLES / "til.json", til_run) == 0
    runs = [*read_runs(TABLES / "til.json"), read_results(til_run)]
    assert capsys.readouterr().out == comparison(runs) + "\n"


def test_the_brief_table_of_files(capsys):
    files = [TABLES / "openavs.json", TABLES / "open_tfcl.json"]
    assert evaluate(*files, "--brief") == 0
    runs = [results for file in files for results in read_runs(file)]
    assert capsys.readouterr().out == brief(runs) + "\n"


def test_packed_runs_are_read_like_folders(tmp_path, capsys):
    runs = [made(seed=s, shift=0.01 * s) for s in range(3)]
    folders = [written(tmp_path / f"run{r['seed']}", r) for r in runs]
    begun = written(tmp_path / "begun", made("ewc", complete=False))
    assert evaluate(*folders[:2], "--pack", tmp_path / "runs.json") == 0
    assert evaluate(folders[2], begun, "--pack", tmp_path / "runs.json") == 0
    assert "1 finished runs of 2" in capsys.readouterr().out
    evaluate(tmp_path / "runs.json")
    packed = capsys.readouterr().out
    evaluate(*folders)
    assert packed == capsys.readouterr().out


def test_the_checkpoints_of_a_run_give_its_scores_again(til_run, tmp_path, capsys):
    assert evaluate(til_run, "--rescore") == 0
    assert "results.json agrees with the checkpoints" in capsys.readouterr().out
    path = til_run / "results.json"
    whole = path.read_text(encoding="utf-8")
    try:
        changed = json.loads(whole)
        changed["matrix"]["mute_area"][1][0] += 1e-3  # no metric follows from it
        changed["matrix"]["J"][2] = None
        changed["complete"] = False
        path.write_text(json.dumps(changed), encoding="utf-8")
        assert evaluate(til_run, "--rescore") == 1
        printed = capsys.readouterr().out
        assert "DIFFERS" in printed and "row 2" not in printed and "row 3" in printed
        changed = json.loads(whole)
        changed["metrics"]["J"]["final"] += 1e-3
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(AtlasError, match="do not follow from its matrices"):
            evaluate(til_run, "--rescore")
    finally:
        path.write_text(whole, encoding="utf-8")


def test_the_difference_of_two_rows():
    assert script.difference([0.5, None], [0.25, None]) == 0.25
    assert script.difference([0.5, None], [0.5, 0.1]) == float("inf")


def test_the_figures_of_one_run(til_run, tmp_path, capsys):
    assert evaluate(til_run, "--figures", "--out", tmp_path / "figures") == 0
    expected = {f"{n}.{e}" for n in ("heatmap", "masks") for e in ("png", "pdf")}
    assert names(tmp_path / "figures") == expected
    begun = made(complete=False)  # no checkpoints, no config
    begun["matrix"]["J"] = begun["matrix"]["J"][:1]
    copy = written(tmp_path / "copy", begun)
    assert evaluate(copy, "--figures") == 0
    assert "no masks drawn" in capsys.readouterr().out
    assert names(copy / "figures") == {"heatmap.png", "heatmap.pdf"}
    with pytest.raises(AtlasError, match="config.yaml"):
        evaluate(copy, "--figures", "--clips", "x")


def test_the_figures_of_several_runs(tmp_path, capsys):
    runs = [made(m, s, 0.01 * s) for m in ("lra", "finetune") for s in (0, 1)]
    folders = [written(tmp_path / f"{r['method']}{r['seed']}", r) for r in runs]
    out = tmp_path / "out"
    assert evaluate(*folders, "--figures", "--out", out, "--methods", "lra") == 0
    assert "| lra | 2 |" in capsys.readouterr().out
    expected = {f"{n}_cil.{e}" for n in ("compare", "heatmaps") for e in ("png", "pdf")}
    assert names(out) == expected


@pytest.mark.parametrize("words, message", [
    (["RUN", "RUN", "--figures"], "give --out DIR"),
    (["RUN", "RUN", "--rescore"], "for one run"),
    (["RUN", "--brief"], "for several runs"),
    (["RUN", "--methods", "lra"], "for several runs"),
    (["RUN", "--audio", "x.wav"], "go with --video"),
    (["RUN", "RUN", "--video", "x.mp4"], "for one run"),
    (["RUN", "--video", "x.mp4"], "--out overlay.mp4"),
    (["RUNS", "--rescore"], "for one run"),
    (["nowhere"], "no results.json in nowhere"),
])  # fmt: skip
def test_what_does_not_go_together_is_said(words, message, tmp_path):
    folder = written(tmp_path / "run", made())
    script.pack(tmp_path / "runs.json", [made()])
    places = {"RUN": folder, "RUNS": tmp_path / "runs.json"}
    with pytest.raises(AtlasError, match=message):
        evaluate(*(places.get(word, word) for word in words))


def test_the_help_fits_a_terminal(capsys):
    with pytest.raises(SystemExit):
        evaluate("--help")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
