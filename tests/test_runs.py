"""Whole runs: what they write, what they share, and the scripts as a user calls them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIGHT, ROOT, SHARED, TINY, one_line, real, run

import train
from atlas import protocols
from atlas.errors import AtlasError
from atlas.folder import Journal
from atlas.methods import METHODS
from atlas.metrics import score_tasks
from atlas.model import clip_losses
from atlas.prepare import synth
from atlas.results import read_results
from atlas.runs import Run, TaskClips, read_run

FAST = [
    *TINY,
    f"visual={LIGHT}",
    "step=2",
    "batch_size=4",
    "epochs_first=1",
    "epochs=1",
    "lr_first=1e-3",
    "lr=1e-3",
    "method=lra",
]


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    """The config of all runs here, in a folder of their own."""
    where = tmp_path_factory.mktemp("runs")
    return replace(config, visual=LIGHT, step=2, method="lra", out_dir=str(where))


@pytest.fixture(scope="module")
def learn(place):
    """A run of `place` with other keys: its folder. A name is learned once."""

    def of(name, **keys):
        folder = Path(place.out_dir, name)
        if not folder.is_dir():
            train.main(replace(place, name=name, **keys))
        return folder

    return of


@pytest.fixture(scope="module")
def lra(place):
    """(folder, process) of one run of 2 tasks, by the real command line."""
    where = [f"{key}={getattr(place, key)}" for key in ("data_root", "cache_dir", "out_dir")]
    done = run("train.py", "--cfg", "configs/ss_cil.yaml", *where, *FAST, "name=lra")
    assert done.returncode == 0, done.stderr
    return Path(place.out_dir, "lra"), done


# ---- what a run writes -------------------------------------------------------------------------


def test_results_have_the_published_schema(lra):
    folder, done = lra
    results = read_results(folder)
    assert results["schema"] == 1 and results["complete"]
    assert (results["method"], results["protocol"]) == ("lra", "cil")
    assert [len(task["classes"]) for task in results["tasks"]] == [2, 2]
    assert results["tasks"][0]["clips"] == {"train": 8, "val": 4, "test": 4}
    for name in ("J", "F", "J_strict", "F_dataset", "J_swap", "mute_area"):
        matrix = np.array(results["matrix"][name])
        assert matrix.shape == (3, 2) and ((0 <= matrix) & (matrix <= 1)).all()
    assert np.array(results["val_matrix"]["J"]).shape == (3, 2)
    J = results["metrics"]["J"]
    names = {"final", "incremental", "learning", "forgetting", "bwt", "fwt", "intransigence"}
    assert names <= J.keys()
    assert J["final"] == pytest.approx(np.mean(results["matrix"]["J"][2]))
    swap = np.mean(results["matrix"]["J_swap"][2])
    assert results["metrics"]["listening"] == pytest.approx(J["final"] - swap)
    p = results["parameters"]
    assert p["total"] > p["trainable"] > p["lora"] > 0
    assert results["method_memory_bytes"] == 2 * 4 * p["trainable"] + 8
    for kind, count in (("train", 2), ("consolidate", 2), ("evaluate", 3)):
        assert len(results["seconds"][kind]) == count
        assert all(seconds > 0 for seconds in results["seconds"][kind])
    assert results["peak_memory_mb"] > 0
    assert results["weights"]["visual"]["source"] == "random" and "RANDOM" in done.stdout
    assert {"commit", "dirty", "config", "seed"} <= results.keys()
    shaped = {"device", "instructions", "threads", "amp", "processes", "torch", "platform"}
    assert shaped <= results["environment"].keys()

    def refuse(name):
        raise AssertionError(name)

    json.loads((folder / "results.json").read_text(), parse_constant=refuse)  # no NaN


def test_the_log_has_raw_and_weighted_losses_and_the_checkpoints_are_there(lra):
    folder, _ = lra
    lines = Journal(folder).lines()
    epochs = [line for line in lines if "epoch" in line]
    assert len(epochs) == 2
    assert {"bce", "dice"} <= epochs[0]["raw"].keys()
    penalties = [line["weighted"]["penalty"] for line in epochs]
    assert penalties[0] == 0 < penalties[1]
    assert [line["consolidated"]["clips"] for line in lines if "consolidated" in line] == [8, 8]
    for k in (1, 2):
        assert {path.name for path in (folder / f"task_{k:02d}").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "model.safetensors",
            "method.safetensors",
        }
    assert not (folder / "progress.pt").exists()


def test_eval_prints_the_same_table_and_the_checkpoints_score_the_same(lra):
    folder, done = lra
    printed = run("eval.py", folder)
    assert printed.returncode == 0 and printed.stdout.strip() in done.stdout
    again = run("eval.py", folder, "--rescore")
    assert again.returncode == 0 and "agrees with" in again.stdout, again.stdout + again.stderr

    results = read_results(folder)
    copy = Path(shutil.copytree(folder, folder.with_name("forged")))
    results["val_matrix"]["J"][2][0] += 0.01
    (copy / "results.json").write_text(json.dumps(results))
    forged = run("eval.py", copy, "--rescore")
    assert forged.returncode == 1 and "DIFFERS" in forged.stdout
    results["metrics"]["J"]["final"] += 0.01
    (copy / "results.json").write_text(json.dumps(results))
    one_line(run("eval.py", copy, "--rescore"), "do not follow")


def test_a_run_folder_is_never_overwritten(lra, place):
    before = sorted((p, p.stat().st_mtime_ns) for p in lra[0].rglob("*"))
    where = [f"{key}={getattr(place, key)}" for key in ("data_root", "cache_dir", "out_dir")]
    one_line(run("train.py", *where, *FAST, "name=lra"), "not empty", "name=", "--resume")
    assert sorted((p, p.stat().st_mtime_ns) for p in lra[0].rglob("*")) == before


def test_no_config_and_no_gpu():
    one_line(run("train.py", "--cfg", "nowhere.yaml"), "nowhere.yaml")
    if not torch.cuda.is_available():
        one_line(run("train.py", "--cfg", "configs/ss_cil.yaml", "device=cuda"), "no GPU")


def test_a_closed_pipe_is_no_traceback(lra):
    command = f"{sys.executable} eval.py {lra[0]} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("lra") and "Traceback" not in done.stderr, done.stderr


# ---- the same seed, and what a key changes -----------------------------------------------------


def test_the_same_seed_gives_the_same_matrices(lra, learn):
    """By the command line, and in this process."""
    one, other = read_results(lra[0]), read_results(learn("again"))
    for key in ("matrix", "val_matrix", "class_matrix", "metrics"):
        assert one[key] == other[key]


def test_lambda_zero_is_finetune_and_the_anchor_changes_later_tasks_only(learn):
    J = {
        "lra": read_results(learn("again"))["matrix"]["J"],
        "finetune": read_results(learn("finetune", method="finetune"))["matrix"]["J"],
        "zero": read_results(learn("zero", lra_lambda=0.0))["matrix"]["J"],
    }
    assert J["zero"] == J["finetune"]
    assert J["lra"][:2] == J["finetune"][:2] and J["lra"][2:] != J["finetune"][2:]


def test_joint_has_two_rows_and_serves_as_intransigence(learn, place):
    with pytest.raises(AtlasError, match="no finished joint run"):
        train.main(replace(place, name="no", joint_run=str(learn("finetune", method="finetune"))))
    assert not Path(place.out_dir, "no").exists()
    joint = read_results(learn("joint", method="joint"))
    assert np.array(joint["matrix"]["J"]).shape == (2, 2)
    assert joint["metrics"]["J"]["forgetting"] is None
    frozen = learn("frozen", method="frozen", joint_run=str(learn("joint", method="joint")))
    frozen = read_results(frozen)
    own = [frozen["matrix"]["J"][k + 1][k] for k in range(2)]
    gap = np.mean(np.array(joint["matrix"]["J"][1]) - own)
    assert frozen["metrics"]["J"]["intransigence"] == pytest.approx(gap)
    assert frozen["parameters"]["lora"] == 0


def test_dil_runs_over_domains(learn):
    rest = ["baby_laughter", "female_singing", "dog_barking"]
    domains = {"speech": ["male_speech"], "rest": rest}
    results = read_results(learn("dil", protocol="dil", method="finetune", domains=domains))
    assert [task["name"] for task in results["tasks"]] == ["speech", "rest"]


def test_ms3_is_scored_on_disjoint_clips_beside_all(learn, ms3_tree, monkeypatch):
    """The synthetic set's test clips share no source with its train clips: both are the same."""
    monkeypatch.setattr(protocols, "audio_segments", lambda x, clips, k: np.arange(len(clips)) % k)
    folder = learn(
        "ms3",
        dataset="ms3",
        data_root=str(ms3_tree),
        protocol="tfcl",
        stream_checkpoints=2,
        lra_trigger="plateau",
    )
    results = read_results(folder)
    found = results["metrics"]["source_disjoint"]
    assert found["clips"] == sum(task["clips"]["test"] for task in results["tasks"]) == 8
    assert found["J"] == pytest.approx(results["metrics"]["J"]["final_clips"])
    assert results["class_matrix"] is None


# ---- a first task that another run has learned -------------------------------------------------


@pytest.fixture(scope="module")
def giver(learn):
    return str(learn("finetune", method="finetune"))


@pytest.mark.parametrize(
    "name, keys",
    [
        ("til", {"protocol": "til", "method": "olora", "lr": 2e-3}),
        ("classify", {"classify": True}),
    ],
)
def test_a_first_task_taken_over_gives_the_run_that_learned_it(learn, giver, name, keys):
    """The same bits in every matrix, also in TIL from CIL's run, whatever method goes on from it.

    Where classes compete, what competed in the first task is what the method measures with.
    """
    if name == "classify":
        giver = str(learn("giver_classify", method="finetune", classify=True))
    whole = learn(f"{name}_whole", **keys)
    taken = learn(f"{name}_taken", **keys, first_task=giver)
    one, other = read_results(whole), read_results(taken)
    for key in ("tasks", "matrix", "val_matrix", "class_matrix", "metrics"):
        assert one[key] == other[key], key
    logs = [Journal(folder).lines() for folder in (whole, taken)]
    assert logs[1][0]["reused"] == giver
    assert read_results(giver)["seconds"]["train"][0] == pytest.approx(other["seconds"]["train"][0])
    reports = [[x["consolidated"] for x in log if "consolidated" in x] for log in logs]
    assert reports[0] == reports[1]
    for path in whole.glob("task_*/*.safetensors"):
        assert path.read_bytes() == (taken / path.relative_to(whole)).read_bytes()


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_took_over_a_first_task_is_resumed_to_the_same_bits(
    learn, place, giver, number, monkeypatch
):
    """Stopped before its first checkpoint, and before its first score."""
    here = replace(place, name=f"stopped_{number}", first_task=giver)
    work = ["consolidate", "evaluate"][number - 1]
    original = getattr(train, work)

    def stop(run, t):
        if t == number:
            raise KeyboardInterrupt
        original(run, t)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, work, stop)
        train.main(here)
    train.main(here, resume=True)
    whole = read_results(learn("again"))
    found = read_results(Path(here.out_dir, here.name))
    for key in ("matrix", "val_matrix", "class_matrix", "metrics"):
        assert whole[key] == found[key], key


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"seed": 5}, r"seed \(0 there, 5 here\)"),
        ({"lr_first": 2e-3}, "lr_first"),
        ({"lora_rank": 4}, "lora_rank"),
        ({"augment": True}, "augment"),
        ({"epochs_first": 2}, "epochs_first"),
        ({"base": 3}, "base"),
        ({"amp": "bf16"}, "amp"),
        ({"protocol": "dil", "domains": {"a": ["male_speech"], "b": []}}, "tasks"),
    ],
)
def test_a_first_task_that_was_learned_otherwise_is_refused(place, giver, keys, said):
    """With and without --resume; the corrected command finds no folder in its way."""
    if "domains" in keys:
        names = ["baby_laughter", "female_singing", "dog_barking"]
        keys = keys | {"domains": keys["domains"] | {"b": names}}
    here = replace(place, name="other", first_task=giver, **keys)
    for resume in (False, True):
        with pytest.raises(AtlasError, match=f"{said}.*first_task=null"):
            train.main(here, resume)
        assert not Path(here.out_dir, "other").exists()


@pytest.mark.parametrize(
    "name", ["torch", "timm", "peft", "python", "platform", "device", "instructions", "threads"]
)
def test_a_first_task_of_another_machine_or_version_is_refused(place, giver, tmp_path, name):
    copy = Path(shutil.copytree(giver, tmp_path / "giver"))
    results = read_results(copy)
    results["environment"][name] = f"another {name}"
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(AtlasError, match=rf"{name} \(another {name} there"):
        train.main(replace(place, name="other", first_task=str(copy)))
    assert not Path(place.out_dir, "other").exists()


def test_only_a_finetune_run_with_its_first_task_can_be_reused(place, learn, giver, tmp_path):
    def refused(path, said):
        with pytest.raises(AtlasError, match=said):
            train.main(replace(place, name="other", first_task=str(path)))
        assert not Path(place.out_dir, "other").exists()

    refused(learn("again"), "it is no finetune run")
    refused(tmp_path / "nowhere", "no results.json")
    copy = Path(shutil.copytree(giver, tmp_path / "giver"))
    (copy / "task_01" / "model.safetensors").write_bytes(b"half of it")
    refused(copy, "model.safetensors is damaged")
    shutil.rmtree(copy / "task_01")
    refused(copy, "is missing")
    results = read_results(copy)
    for name in ("matrix", "val_matrix"):
        results[name] = {score: rows[:1] for score, rows in results[name].items()}
    (copy / "results.json").write_text(json.dumps(results | {"complete": False, "metrics": None}))
    refused(copy, "no finetune run that has learned a task")


# ---- a Run in this process ---------------------------------------------------------------------


def test_a_run_is_opened_again_with_its_results(lra):
    found = read_run(lra[0])
    assert found.results == read_results(lra[0])
    assert found.learned == 2 and found.folder == lra[0]
    for t in (1, 2):
        found.load_task(t)
        assert score_tasks(found, t)["test"]["J"] == found.results["matrix"]["J"][t]


@pytest.mark.parametrize("name", ["visual", "audio"])
def test_a_run_of_other_encoders_is_refused(lra, tmp_path, name):
    copy = Path(shutil.copytree(lra[0], tmp_path / "run"))
    results = read_results(copy)
    results["weights"][name]["sha256"] = "0" * 64
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(AtlasError, match=f"the {name} encoder is not the one"):
        read_run(copy)


@pytest.mark.parametrize("clips", [0, 3, 99])
def test_a_method_measures_the_clips_of_its_task_once_in_eval_mode(place, clips):
    """All of them, or `lra_clips` drawn from them by seed and task."""
    opened = Run(replace(place, lra_clips=clips))
    opened.model.train()
    chosen = []
    for batch in TaskClips(opened, 1):
        assert not opened.model.training
        chosen += batch["index"]
        assert len(set(torch.bincount(batch["clip"]).tolist())) == 1
    train_clips = opened.tasks[0].train
    assert len(chosen) == len(set(chosen)) == (3 if clips == 3 else len(train_clips))
    assert set(chosen) <= set(train_clips)
    assert chosen == [i for batch in TaskClips(opened, 1) for i in batch["index"]]


def test_clips_of_other_frame_counts_go_apart(place):
    opened = Run(place)
    opened.cache.arrays["annotated"] = opened.cache.arrays["annotated"].copy()
    own = list(opened.tasks[0].train)
    opened.cache.arrays["annotated"][own[:3]] = True
    batches = list(TaskClips(opened, 1))
    assert sorted(i for batch in batches for i in batch["index"]) == sorted(own)
    counts = [torch.bincount(batch["clip"]).tolist() for batch in batches]
    assert counts == [[1] * (len(own) - 3), [5] * 3]


def test_the_loss_of_task_clips_is_the_mean_task_loss(place):
    """Without the penalty, weighted: what learn() adds up."""
    opened = Run(replace(place, w_bce=2.0))
    clips = TaskClips(opened, 1)
    batch = next(iter(clips))
    with torch.no_grad():
        outputs = opened.model(batch)
    terms = clip_losses(outputs, batch)
    expected = (2 * terms["bce"] + terms["dice"]).mean()
    torch.testing.assert_close(clips.loss(outputs, batch), expected)


def test_every_name_of_the_table_builds(place):
    """A name without a working entry would be an error, never finetuning in silence."""
    built = {}
    for name in METHODS:
        built[name] = type(Run(replace(place, method=name)).method).__name__
    plain = [name for name, kind in built.items() if kind == "Method"]
    assert plain == ["finetune", "frozen", "joint"]
    assert len(set(built.values())) == len(METHODS) - 2


def test_synth_true_makes_the_set_on_first_use(tmp_path, place, monkeypatch):
    made, make_set = [], synth.make_set

    def small(dataset, root):
        made.append(dataset)
        make_set(dataset, root, size=32, train=1, val=1, test=1, classes=synth.CLASSES[:2])

    monkeypatch.setattr(synth, "make_set", small)
    root = str(tmp_path / "new")
    here = replace(place, synth=True, data_root=root, cache_dir=str(tmp_path / "c"), base=1)
    for name in ("first", "second"):
        train.main(replace(here, out_dir=str(tmp_path), name=name, epochs_first=0, epochs=0))
    assert made == ["s4"]
    assert len(read_results(tmp_path / "second")["tasks"]) == 2


@real
def test_real_weights(place, tmp_path):
    """CIL with pretrained encoders from files, a step or two of it, in one task."""
    weights = SHARED / "weights"
    here = replace(
        place,
        out_dir=str(tmp_path),
        name="run",
        visual="mobilenetv2_100",
        visual_weights=str(weights / "mobilenetv2_100.imagenet.safetensors"),
        audio="yamnet",
        audio_weights=str(weights / "mobilenetv1_100.yamnet.safetensors"),
        base=4,
        method="finetune",
    )
    train.main(here)
    results = read_results(tmp_path / "run")
    sources = {name: told["source"] for name, told in results["weights"].items()}
    assert sources == {"visual": here.visual_weights, "audio": here.audio_weights}
