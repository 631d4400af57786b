"""A run that is stopped anywhere and resumed ends in the very bits of one that was not."""

import contextlib
import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import LIGHT, one_line, run

import train
from atlas import learner, metrics
from atlas.config import as_dict
from atlas.errors import AtlasError
from atlas.folder import Journal, consolidations, take_folder
from atlas.lra import LowRankAnchoring
from atlas.results import read_results
from atlas.runs import Run
from atlas.updates import Updates

STREAM = {
    "protocol": "tfcl",
    "stream_checkpoints": 2,
    "batch_size": 2,
    "stream_epochs": 2,
    "lra_trigger": "plateau",
    "lra_window": 2,
    "lra_peak": 0.0,
    "warmup": 0.5,
}
KINDS = {
    "cil": {"protocol": "cil"},
    "til": {"protocol": "til", "classify": True},
    "dil": {"protocol": "dil", "method": "olora"},
    "tfcl": STREAM,
}
DOMAINS = {"one": ["male_speech"], "other": ["baby_laughter", "female_singing", "dog_barking"]}


class Stop(BaseException):
    """Stands for a kill: nothing in the code catches it."""


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    """The config of all runs here, in a folder of their own."""
    return replace(
        config,
        visual=LIGHT,
        out_dir=str(tmp_path_factory.mktemp("resume")),
        step=2,
        epochs_first=2,
        epochs=2,
        method="lra",
        lora_dropout=0.1,
        augment=True,
        lra_clips=3,
        domains=DOMAINS,
    )


@pytest.fixture(scope="module")
def whole(place):
    """kind -> (folder, config) of the run that nothing stopped; made once each."""
    made = {}

    def of(kind):
        if kind not in made:
            here = replace(place, name=f"{kind}_whole", **KINDS[kind])
            train.main(here)
            folder = Path(here.out_dir, here.name)
            results = read_results(folder)
            assert kind != "tfcl" or results["consolidations"]
            made[kind] = (folder, here)
        return made[kind]

    return of


def same(one, other):
    """The two runs have the same matrices, metrics, log and checkpoints, to the bit."""
    a, b = read_results(one), read_results(other)
    assert a["complete"] and b["complete"]
    for key in ("matrix", "val_matrix", "class_matrix", "metrics", "consolidations"):
        assert a[key] == b[key], key
    logs = []
    for folder in (one, other):
        lines = Journal(folder).lines()
        logs.append([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
    assert logs[0] == logs[1]
    same_checkpoints(one, other)


def same_checkpoints(one, other):
    paths = sorted(one.glob("task_*/*.safetensors"))
    assert len(paths) == 6 == len(list(other.glob("task_*/*.safetensors")))
    for path in paths:
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


EVENTS = {
    "step": (Updates, "step"),
    "log": (Journal, "write"),
    "measurement": (LowRankAnchoring, "end_task"),
    "tensors": (learner, "save_file"),
    "file": (os, "replace"),
    "checkpoint": (os, "rename"),
    "score": (metrics, "score"),
    "begin": (Run, "begin"),
    "finish": (Run, "finish"),
}


@contextlib.contextmanager
def stopping(number, *names):
    """Raise Stop before the number-th call of any of these EVENTS. Without names: of them all."""
    left = [number]

    def counted(work):
        def of(*words, **named):
            left[0] -= 1
            if not left[0]:
                raise Stop
            return work(*words, **named)

        return of

    with pytest.MonkeyPatch.context() as patch:
        for name in names or EVENTS:
            holder, attribute = EVENTS[name]
            patch.setattr(holder, attribute, counted(getattr(holder, attribute)))
        yield


def stop(config, number, *names):
    """Begin a run, or go on with it, until it is stopped; whether it was."""
    try:
        with stopping(number, *names):
            train.main(config, resume=True)
    except Stop:
        return True
    return False


@pytest.mark.parametrize(
    "kind, number, event",
    [
        ("cil", 3, "score"),  # of the untrained model
        ("cil", 4, "step"),  # in the second epoch
        ("cil", 3, "log"),  # what was measured is lost
        ("cil", 2, "tensors"),  # in a checkpoint
        ("cil", 1, "checkpoint"),  # which is not yet in its place
        ("cil", 6, "score"),  # after a checkpoint, in its evaluation
        ("cil", 1, "finish"),
        ("til", 6, "step"),
        ("dil", 5, "step"),
        ("tfcl", 11, "step"),
        ("tfcl", 6, "score"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(whole, kind, number, event):
    folder, config = whole(kind)
    here = replace(config, name=f"{kind}_{event}_{number}")
    assert stop(here, number, event)
    train.main(here, resume=True)
    same(folder, Path(here.out_dir, here.name))


@pytest.mark.parametrize("kind", ["cil", "tfcl"])
def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_bits(whole, kind):
    """Before any event: a step, a line of the log, a file or folder that takes its place, ..."""
    folder, config = whole(kind)
    here = replace(config, name=f"{kind}_often")
    rng = np.random.default_rng(5)
    stops = 0
    while stop(here, int(rng.integers(8, 32))):
        stops += 1
    assert stops >= 2
    same(folder, Path(here.out_dir, here.name))


# ---- files that are missing or torn ------------------------------------------------------------


def copied(folder, config, name):
    """A run's folder under another name, as if it had been made there; and its config."""
    here = replace(config, name=name)
    copy = Path(shutil.copytree(folder, Path(here.out_dir, name)))
    text = yaml.safe_dump(as_dict(here), sort_keys=False)
    (copy / "config.yaml").write_text(text)
    return copy, here


def learned_again(config, monkeypatch):
    """Resume a run; the tasks in which a step was taken."""
    steps = []
    learn = train.learn

    def watched(run, batch):
        steps.append(run.plan.t)
        return learn(run, batch)

    monkeypatch.setattr(train, "learn", watched)
    train.main(config, resume=True)
    return sorted(set(steps))


@pytest.mark.parametrize("kind", ["til", "tfcl"])
@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_without_results_the_rows_are_scored_again_and_nothing_is_learned(
    whole, kind, damage, monkeypatch, capsys
):
    folder, config = whole(kind)
    copy, here = copied(folder, config, f"{kind}_{damage}")
    path = copy / "results.json"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:500])
    assert learned_again(here, monkeypatch) == []
    same(folder, copy)
    printed = capsys.readouterr().out
    for t in range(3):
        assert f"row {t} of R is scored again" in printed
    assert ("is damaged" in printed) == (damage == "torn")
    spent = [read_results(f)["seconds"]["train"] for f in (folder, copy)]
    assert spent[0] == spent[1]  # the log tells them


@pytest.mark.parametrize("number, event", [(11, "step"), (6, "score")])
def test_a_lost_log_costs_no_consolidation(whole, number, event):
    """Stopped in a chunk, and after a checkpoint of which results.json has no row."""
    folder, config = whole("tfcl")
    here = replace(config, name=f"lost_log_{event}")
    copy = Path(here.out_dir, here.name)
    assert stop(here, number, event)
    assert consolidations(Journal(copy).lines())
    (copy / "log.jsonl").unlink()
    train.main(here, resume=True)
    one, other = read_results(folder), read_results(copy)
    assert one["consolidations"] == other["consolidations"]
    same_checkpoints(folder, copy)


def test_a_torn_progress_costs_its_task_alone(whole, monkeypatch, capsys):
    folder, config = whole("cil")
    here = replace(config, name="torn_progress")
    copy = Path(here.out_dir, here.name)
    assert stop(here, 8, "step")  # two steps an epoch: the last of the second task
    assert (copy / "task_01").is_dir()
    path = copy / "progress.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    assert learned_again(here, monkeypatch) == [2]
    assert "progress.pt is damaged" in capsys.readouterr().out
    same(folder, copy)


def unfinished(folder, config, name):
    """A copy of a run that was stopped before it finished, with the rows and checkpoints of all."""
    copy, here = copied(folder, config, name)
    results = read_results(copy)
    results |= {"complete": False, "metrics": None}
    (copy / "results.json").write_text(json.dumps(results))
    return copy, here


@pytest.mark.parametrize("kind", ["cil", "tfcl"])
def test_a_checkpoint_that_is_removed_is_learned_again_and_only_that(
    whole, kind, monkeypatch, capsys
):
    folder, config = whole(kind)
    copy, here = unfinished(folder, config, f"{kind}_removed")
    shutil.rmtree(copy / "task_02")
    assert learned_again(here, monkeypatch) == [2]
    assert "task 2 has no checkpoint; going on after task 1" in capsys.readouterr().out
    same(folder, copy)


def test_a_checkpoint_that_is_torn_is_named_with_the_remedy(whole):
    folder, config = whole("cil")
    copy, here = unfinished(folder, config, "torn_checkpoint")
    path = copy / "task_02" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AtlasError) as error:
        train.main(here, resume=True)
    assert f"{path} is damaged" in str(error.value)
    assert f"remove {path.parent}" in str(error.value)  # which the test above does


def test_the_optimiser_of_a_stream_that_is_torn_is_named(whole):
    folder, config = whole("tfcl")
    copy, here = unfinished(folder, config, "torn_updates")
    shutil.rmtree(copy / "task_02")
    path = copy / "task_01" / "updates.pt"
    path.write_bytes(b"")
    with pytest.raises(AtlasError, match="updates.pt is damaged") as error:
        train.main(here, resume=True)
    assert f"remove {path.parent}" in str(error.value)


def test_a_row_whose_checkpoint_is_lost_stays_null_and_so_does_what_needs_it(
    whole, monkeypatch, capsys
):
    folder, config = whole("cil")
    copy, here = copied(folder, config, "lost_row")
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "task_01")
    assert learned_again(here, monkeypatch) == []
    assert "row 1 of R is lost and stays null" in capsys.readouterr().out
    one, other = read_results(folder), read_results(copy)
    for name, rows in other["matrix"].items():
        assert rows == [one["matrix"][name][0], None, one["matrix"][name][2]]
    for name in ("final", "fwt", "forgetting", "learning"):
        expected = one["metrics"]["J"]["final"] if name == "final" else None
        assert other["metrics"]["J"][name] == expected, name


# ---- what is refused, and what needs nothing ---------------------------------------------------


def test_a_finished_run_prints_its_table_and_changes_nothing(whole, monkeypatch, capsys):
    folder, config = whole("cil")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert learned_again(config, monkeypatch) == []
    printed = capsys.readouterr().out
    assert "is finished" in printed and "forgetting" in printed
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before


def test_another_config_is_refused_by_its_keys(whole):
    _, config = whole("cil")
    with pytest.raises(AtlasError, match=r"lr \(0.001 there, 0.002 here\)"):
        train.main(replace(config, lr=2e-3), resume=True)


def test_without_resume_a_folder_is_never_overwritten(whole):
    folder, config = whole("cil")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(AtlasError, match="not empty.*name=.*--resume"):
        train.main(config)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_data_or_encoders_that_changed_are_refused(whole):
    folder, config = whole("cil")
    for change, said in (("tasks", "its tasks now have other clips"), ("weights", "audio encoder")):
        copy, here = unfinished(folder, config, f"changed_{change}")
        results = read_results(copy)
        results["tasks"][0]["clips"]["train"] -= change == "tasks"
        results["weights"]["audio"]["sha256"] += "0" * (change == "weights")
        (copy / "results.json").write_text(json.dumps(results))
        with pytest.raises(AtlasError, match=said):
            train.main(here, resume=True)


def test_resume_where_there_is_nothing_starts(place):
    here = replace(place, name="new", epochs_first=0, epochs=0)
    train.main(here, resume=True)
    assert read_results(Path(here.out_dir, "new"))["complete"]


# ---- through the real command line -------------------------------------------------------------


def command(config, *words):
    """The words of train.py for a config."""
    own = {key: value for key, value in as_dict(config).items() if key != "domains"}
    told = [f"{key}={'null' if value is None else value}" for key, value in own.items()]
    return ["train.py", *told, *words]


def when(condition, how=signal.SIGKILL):
    return lambda: how if condition() else None


def test_sigkill(whole):
    folder, config = whole("cil")
    here = replace(config, name="killed", domains=None)
    copy = Path(here.out_dir, here.name)
    done = run(*command(here), stop=when(lambda: (copy / "task_01").is_dir()))
    assert done.returncode == -signal.SIGKILL
    done = run(*command(here, "--resume"))
    assert done.returncode == 0, done.stderr
    same(folder, copy)


def test_ctrl_c_is_one_line_and_keeps_what_is_finished(whole):
    folder, config = whole("tfcl")
    here = replace(config, name="ctrl_c", domains=None)
    copy = Path(here.out_dir, here.name)

    def late():
        path = copy / "log.jsonl"
        return path.is_file() and path.read_text().count("\n") > 4

    done = run(*command(here), stop=when(late, signal.SIGINT))
    assert done.returncode == 130, done.stderr
    one_line(done, "Ctrl-C", "--resume")
    train.main(here, resume=True)
    same(folder, copy)


def test_a_full_disk_is_one_line_and_keeps_the_last_good_state(whole):
    """No file may grow beyond 40 kB: the first checkpoint of any kind cannot be written."""
    folder, config = whole("cil")
    here = replace(config, name="full", domains=None)
    copy = Path(here.out_dir, here.name)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    one_line(run(*command(here), preexec_fn=limit), "--resume")
    assert read_results(copy)["matrix"]["J"] and not list(copy.glob("task_*"))
    train.main(here, resume=True)
    same(folder, copy)


def test_a_folder_in_use_is_one_line(whole):
    _, config = whole("cil")
    here = replace(config, name="in_use", domains=None)
    lock = take_folder(Path(here.out_dir, here.name), here, resume=True)
    one_line(run(*command(here, "--resume")), "is in use")
    lock.close()
