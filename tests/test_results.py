"""results.json: writing rows, reading, null rows, damage; the compact files of many runs."""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from atlas.config import Config
from atlas.errors import AtlasError
from atlas.metrics import continual_metrics
from atlas.report.packed import pack, read_runs
from atlas.report.summary import row_text, summary
from atlas.results import (
    TEST_SCORES,
    add_scores,
    derived_metrics,
    environment,
    first_rows,
    new_results,
    read_joint,
    read_results,
)

R = [[0.1, 0.1, 0.1], [0.6, 0.2, 0.1], [0.5, 0.7, 0.2], [0.4, 0.5, 0.6]]


ABOUT = {  # as runs.Run.about
    "parameters": {"total": 1000, "trainable": 100, "lora": 10},
    "weights": {
        "visual": {"source": "random", "sha256": "0"},
        "audio": {"source": "none needed", "sha256": "1"},
    },
}


def tasks_of():
    """Three tasks of one class each."""
    tasks = []
    for j in range(3):
        clips = {"train": range(4), "val": range(2), "test": range(2 + j)}
        tasks.append(SimpleNamespace(name=f"t{j}", classes=[f"c{j}"], begins=8.0 * j, **clips))
    return tasks


def begun(**keys):
    """The results of a run that has no row yet."""
    config = Config(**{"batch_size": 4} | keys)
    machine = environment() | {"device": "cpu", "threads": 1, "amp": "off"}
    found = new_results(config, tasks_of(), ["c0", "c1", "c2"]) | ABOUT
    return copy.deepcopy(found | {"environment": machine})


def a_row(values):
    test = {name: list(values) for name in TEST_SCORES}
    return {"test": test, "val": list(values), "classes": list(values), "seconds": 2.0}


def finished(matrix=R, **keys):
    results = begun(**keys)
    for row in matrix:
        add_scores(results, row and a_row(row))
    for part in ("train", "consolidate"):
        results["seconds"][part] = [1.0] * (len(matrix) - 1)
    metrics = derived_metrics(results) | {"source_disjoint": None}
    return results | {"complete": True, "metrics": metrics, "method_memory_bytes": 2_500_000}


def write(folder, results):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_a_new_run_has_its_schema_its_versions_and_no_rows():
    results = begun(seed=3)
    assert results["schema"] == 1 and results["seed"] == 3 and not results["complete"]
    assert results["tasks"][1]["clips"] == {"train": 4, "val": 2, "test": 3}
    assert {"torch", "timm", "peft", "python", "platform", "device"} <= set(results["environment"])
    assert results["method_memory_bytes"] is None and "sensitivity" not in results
    assert set(results["matrix"]) == set(TEST_SCORES)
    json.dumps(results, allow_nan=False)


def test_rows_are_appended_to_every_matrix_and_metrics_follow():
    results = finished()
    assert results["matrix"]["J_swap"] == R and results["val_matrix"]["J"] == R
    assert results["class_matrix"] == {"classes": ["c0", "c1", "c2"], "J": R}
    assert results["seconds"]["evaluate"] == [2.0] * 4
    metrics = results["metrics"]
    for name, value in continual_metrics(R).items():
        assert metrics["J"][name] == value
    assert metrics["J"]["final_clips"] == pytest.approx((0.4 * 2 + 0.5 * 3 + 0.6 * 4) / 9)
    assert metrics["listening"] == pytest.approx(0) and metrics["mute_area"] == pytest.approx(0.5)
    joint = dict.fromkeys(TEST_SCORES, [0.9, 0.9, 0.9])
    found = derived_metrics(results, joint)["J"]["intransigence"]
    assert found == pytest.approx((0.3 + 0.2 + 0.3) / 3)


@pytest.mark.parametrize("lost, kept", [(0, "all but fwt"), (2, "final"), (3, "fwt")])
def test_a_row_that_was_not_scored_is_null_and_so_is_what_needs_it(lost, kept):
    whole = finished()["metrics"]["J"]
    matrix = [row if k != lost else None for k, row in enumerate(R)]
    results = finished(matrix)
    metrics = results["metrics"]["J"]
    known = {name for name in continual_metrics(R) if metrics[name] is not None}
    expected = {"final": {"final"}, "fwt": {"fwt"}}.get(kept)
    expected = expected or {name for name, value in whole.items() if value is not None}
    assert known == expected - ({"fwt", "final_clips"} if lost == 0 else set())
    assert all(metrics[name] == whole[name] for name in known)
    assert "not scored" in row_text(results, lost) and "–" in summary(results)


def test_row_text_has_the_change_against_the_best_past_score():
    results = finished()
    assert row_text(results, 0) == "(0.100) | (0.100) | (0.100)"
    assert row_text(results, 3) == "0.400 -0.20 | 0.500 -0.20 | 0.600"
    assert row_text(finished([R[0], R[3]], method="joint"), 1) == "0.400 | 0.500 | 0.600"


def test_the_summary_says_memory_and_on_a_stream_consolidations_and_drifts():
    text = summary(finished())
    assert "2.5 MB" in text and "task 3" in text and "random weights" in text
    assert "drift" not in text and "final" in text
    stream = finished(protocol="tfcl", dataset="ms3")
    stream |= {"consolidations": [{"step": 3, "reason": "x"}], "drifts": [2, 4]}
    text = summary(stream)
    assert "consolidated after steps 3" in text and "at steps   2, 4" in text
    assert "segment 3" in text and "checkpoint 3" in text and "task" not in text.split("\n\n")[1]


def test_the_summary_of_an_unfinished_run_says_how_to_go_on():
    results = begun()
    assert "--resume" in summary(results) and "0 of 4 rows" in summary(results)
    add_scores(results, a_row(R[0]))
    assert "1 of 4 rows" in summary(results) and "0.100" in summary(results)


def test_results_of_older_versions_are_read(tmp_path):
    old = finished()
    del old["method_memory_bytes"], old["class_matrix"]
    old |= {"sensitivity": "clip"}
    old["config"] |= {"watch": True, "lr_rest": 1.0}
    assert "keeps" not in summary(read_results(write(tmp_path / "old", old)))


def test_the_drifts_are_the_steps_at_which_segments_begin():
    config = Config(batch_size=4)
    tasks = tasks_of()
    assert new_results(config, tasks)["drifts"] == [2, 4]
    for task in tasks:
        task.begins = None
    assert new_results(config, tasks)["drifts"] == []


def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path):
    with pytest.raises(AtlasError, match="no results.json in"):
        read_results(tmp_path / "nowhere")
    folder = write(tmp_path / "run", finished())
    path = folder / "results.json"
    whole = path.read_bytes()
    wrong = [whole[: len(whole) // 2], b"", b"[]", b"{}", whole.replace(b"t0", b"t\xff")]
    for key in ("matrix", "tasks", "config", "metrics"):
        wrong.append(json.dumps(finished() | {key: None}).encode())
    narrow = finished()
    narrow["matrix"]["J"][2] = [0.5]
    wrong.append(json.dumps(narrow).encode())
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(AtlasError, match="is damaged .*--resume") as error:
            read_results(folder)
        assert str(path) in str(error.value)
    path.write_text(json.dumps(finished() | {"schema": 2}))
    with pytest.raises(AtlasError, match="has schema 2; this version reads schema 1"):
        read_results(folder)


def test_a_joint_run_counts_for_its_own_tasks_only(tmp_path):
    joint = finished([R[0], R[3]], method="joint")
    folder = write(tmp_path / "joint", joint)
    assert read_joint(None, []) is None
    assert read_joint(folder, joint["tasks"])["J"] == R[3]
    for other in (joint["tasks"][:2], joint["tasks"][::-1]):
        with pytest.raises(AtlasError, match="no finished joint run"):
            read_joint(folder, other)


def test_many_runs_in_one_file_come_back_as_they_were(tmp_path):
    runs = [finished(seed=s, method=m) for s in (0, 1) for m in ("lra", "finetune", "ewc")]
    runs.append(finished([R[0], R[3]], method="joint"))
    runs[0]["class_matrix"] = None
    runs[1]["config"]["domains"] = {"a": ["c0"], "b.c": ["c1", "c2"]}
    runs[2]["matrix"]["J"][1] = None
    original = copy.deepcopy(runs)
    pack(tmp_path / "runs.json", runs)
    assert runs == original
    found = read_runs(tmp_path / "runs.json")
    assert len(found) == len(runs)
    for results in runs:
        twin = [r for r in found if r["config"] == results["config"]][0]
        assert twin["matrix"] == results["matrix"] and twin["tasks"] == results["tasks"]
        assert twin["metrics"]["J"] == pytest.approx(results["metrics"]["J"], abs=1e-5)
        assert summary(twin) == summary(results)
    assert (tmp_path / "runs.json").stat().st_size < sum(len(json.dumps(r)) for r in runs) / 2


def test_a_run_of_the_same_config_replaces_the_one_in_the_file(tmp_path):
    pack(tmp_path / "runs.json", [finished(seed=0), finished(seed=1)])
    better = finished([*R[:3], [0.7, 0.7, 0.7]], seed=1, name="again", out_dir="elsewhere")
    pack(tmp_path / "runs.json", [better, finished(seed=2)])
    finals = {r["seed"]: r["metrics"]["J"]["final"] for r in read_runs(tmp_path / "runs.json")}
    assert finals == {0: 0.5, 1: 0.7, 2: 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["runs.json"]


def test_a_run_folder_and_a_file_are_read_alike_and_other_files_are_refused(tmp_path):
    folder = write(tmp_path / "run", finished())
    assert read_runs(folder) == [finished() | {"environment": read_runs(folder)[0]["environment"]}]
    for content in ("{}", "[1]", "x", '{"shared": {}, "groups": [{}]}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(AtlasError, match="no file of runs"):
            read_runs(tmp_path / "other.json")


def test_reading_results_loads_no_torch():
    code = (
        "import sys, eval, atlas.report.table; print({'torch', 'numpy', 'scipy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_first_rows_cut_every_matrix_and_what_they_took():
    found = {
        "matrix": {"J": [[0], [1], [2], None], "F": [[0], [1], [2], [3]]},
        "val_matrix": {"J": [[0], [1], [2], [3]]},
        "class_matrix": {"classes": ["a"], "J": [[0], [1], [2], [3]]},
        "seconds": {"train": [1, 2, 3], "consolidate": [4, 5, 6], "evaluate": [0, 7, 8, 9]},
    }
    rows = first_rows(found, 2)
    assert rows == {
        "matrix": {"J": [[0], [1]], "F": [[0], [1]]},
        "val_matrix": {"J": [[0], [1]]},
        "class_matrix": {"classes": ["a"], "J": [[0], [1]]},
        "seconds": {"train": [1], "consolidate": [4], "evaluate": [0, 7]},
    }
    assert first_rows(found | {"class_matrix": None}, 2)["class_matrix"] is None
