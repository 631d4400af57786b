"""The scripts as a user runs them, each in its own process."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import timm
import torch
from conftest import ROOT, SHARED, TINY, one_line, real, run
from peft import PeftModel
from safetensors.torch import load_file

from atlas.clips import read_s4
from atlas.config import load_config
from atlas.model import build_model
from atlas.runs import load_checkpoint

FAST = [
    *TINY,
    "batch_size=2",
    "epochs_first=1",
    "epochs=1",
    "lr_first=1e-3",
    "lr=1e-3",
    "method=lra",
]


@pytest.fixture(scope="session")
def place(tree, tmp_path_factory):
    """key=values that put runs and caches into a folder of their own."""
    where = tmp_path_factory.mktemp("runs")
    return where, [f"data_root={tree}", f"out_dir={where}", f"cache_dir={where / 'cache'}"]


@pytest.fixture(scope="session")
def lra(place):
    """(folder, process) of one run of 3 tasks."""
    done = run("train.py", "--cfg", "configs/ss_cil.yaml", *place[1], *FAST, "name=lra")
    assert done.returncode == 0, done.stderr
    return place[0] / "lra", done


def test_results_have_the_published_schema(lra):
    folder, done = lra
    results = json.loads((folder / "results.json").read_text())
    assert (
        results["schema"] == 1
        and results["complete"]
        and results["method"] == "lra"
        and results["protocol"] == "cil"
    )
    assert [len(t["classes"]) for t in results["tasks"]] == [2, 1, 1] and results["tasks"][0][
        "clips"
    ] == {"train": 8, "val": 4, "test": 4}
    for name in ("J", "F", "J_strict", "F_dataset", "J_swap", "mute_area"):
        matrix = np.array(results["matrix"][name])
        assert matrix.shape == (4, 3) and ((0 <= matrix) & (matrix <= 1)).all()
    assert np.array(results["val_matrix"]["J"]).shape == (4, 3)
    assert set(results["metrics"]["J"]) >= {
        "final",
        "incremental",
        "learning",
        "forgetting",
        "bwt",
        "fwt",
        "intransigence",
    }
    assert results["metrics"]["J"]["final"] == pytest.approx(np.mean(results["matrix"]["J"][3]))
    swap = np.mean(results["matrix"]["J_swap"][3])
    assert results["metrics"]["listening"] == pytest.approx(results["metrics"]["J"]["final"] - swap)
    p = results["parameters"]
    assert (
        p["total"] > p["trainable"] > p["lora"] > 0
        and len(results["seconds"]["train"]) == 3
        and results["peak_memory_mb"] > 0
    )
    assert results["weights"]["visual"]["source"] == "random" and "RANDOM" in done.stdout
    assert {"commit", "dirty", "environment", "config", "seed"} <= results.keys()


def test_the_log_has_raw_and_weighted_losses_and_the_checkpoints_are_there(lra):
    folder, _ = lra
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "epoch" in line]
    assert (
        len(epochs) == 3
        and {"bce", "dice"} <= epochs[0]["raw"].keys()
        and epochs[0]["weighted"]["penalty"] == 0 < epochs[1]["weighted"]["penalty"]
    )
    assert [line["consolidated"]["clips"] for line in lines if "consolidated" in line] == [8, 4, 4]
    for k in (1, 2, 3):
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "model.safetensors",
            "method.safetensors",
        } <= {p.name for p in (folder / f"task_{k:02d}").iterdir()}


def test_eval_prints_the_same_table_and_the_checkpoints_score_the_same(lra):
    folder, done = lra
    printed = run("eval.py", folder)
    assert printed.returncode == 0 and printed.stdout.strip() in done.stdout
    again = run("eval.py", folder, "--rescore")
    assert again.returncode == 0 and "agrees with" in again.stdout, again.stdout + again.stderr

    results = json.loads((folder / "results.json").read_text())
    copy = Path(shutil.copytree(folder, folder.with_name("forged")))
    results["val_matrix"]["J"][2][0] += 0.01
    (copy / "results.json").write_text(json.dumps(results))
    forged = run("eval.py", copy, "--rescore")
    assert forged.returncode == 1 and "DIFFERS" in forged.stdout
    results["metrics"]["J"]["final"] += 0.01
    (copy / "results.json").write_text(json.dumps(results))
    one_line(run("eval.py", copy, "--rescore"), "do not follow")


def test_a_runs_adapters_travel_to_plain_timm_and_peft(lra, cache):
    """`task_NN/` opens with PEFT alone, on an encoder that timm alone made with the weights the run had, and gives the features of the run's own model."""
    config = load_config([lra[0] / "config.yaml"])
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = []
    for k in (1, 2, 3):
        own = build_model(config, cache.context_dim, cache.token_dim).eval()
        load_checkpoint(lra[0] / f"task_{k:02d}", own)
        torch.manual_seed(config.seed)  # visual_weights: false
        encoder = timm.create_model(config.visual, features_only=True)
        mean, std = (
            255
            * torch.tensor(timm.get_pretrained_cfg(config.visual).to_dict()[name]).view(1, 3, 1, 1)
            for name in ("mean", "std")
        )
        travelled = PeftModel.from_pretrained(encoder, lra[0] / f"task_{k:02d}").eval()
        with torch.no_grad():
            features.append(travelled((frames - mean) / std))
            for a, b in zip(features[-1], own.encode(frames), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            with travelled.disable_adapter():
                assert not torch.equal(
                    travelled((frames - mean) / std)[-1], features[-1][-1]
                )  # the adapter is there and does something
    assert not torch.equal(features[0][-1], features[2][-1])


def test_the_same_seed_gives_the_same_matrices(lra, place):
    done = run("train.py", "--cfg", "configs/ss_cil.yaml", *place[1], *FAST, "name=again")
    assert done.returncode == 0, done.stderr
    first, second = (
        json.loads((folder / "results.json").read_text()) for folder in (lra[0], place[0] / "again")
    )
    assert (
        first["matrix"] == second["matrix"]
        and first["val_matrix"] == second["val_matrix"]
        and first["metrics"] == second["metrics"]
    )


def test_lambda_zero_is_finetune_and_the_anchor_changes_later_tasks_only(lra, place):
    for name, words in (("finetune", ["method=finetune"]), ("zero", ["lra_lambda=0"])):
        assert (
            run(
                "train.py", "--cfg", "configs/ss_cil.yaml", *place[1], *FAST, *words, f"name={name}"
            ).returncode
            == 0
        )
    J = {
        name: json.loads((place[0] / name / "results.json").read_text())["matrix"]["J"]
        for name in ("lra", "finetune", "zero")
    }
    assert (
        J["zero"] == J["finetune"]
        and J["lra"][:2] == J["finetune"][:2]
        and J["lra"][2:] != J["finetune"][2:]
    )


def test_a_first_task_taken_over_gives_the_run_that_learned_it(lra, place):
    """first_task=RUN: the same bits in every matrix but for what was not learned anew, also after TIL's run from CIL's, whatever method it begins."""
    call = lambda *words: run("train.py", "--cfg", "configs/ss_cil.yaml", *place[1], *FAST, *words)
    assert call("method=finetune", "name=giver").returncode == 0
    told = {"lra": [], "olora": ["method=olora"], "til": ["protocol=til", "method=lra_plus"]}
    for name, words in told.items():
        for run_name, more in (
            (f"{name}_whole", []),
            (f"{name}_taken", [f"first_task={place[0] / 'giver'}"]),
        ):
            done = call(*words, *more, f"name={run_name}")
            assert done.returncode == 0, done.stderr
        whole, taken = (
            json.loads((place[0] / f"{name}_{end}" / "results.json").read_text())
            for end in ("whole", "taken")
        )
        assert all(
            whole[key] == taken[key]
            for key in ("tasks", "matrix", "val_matrix", "class_matrix", "metrics")
        ), name
        logs = [
            [
                json.loads(line)
                for line in (place[0] / f"{name}_{end}" / "log.jsonl").read_text().splitlines()
            ]
            for end in ("whole", "taken")
        ]
        assert logs[1][0] == {"task": 1, "taken_from": str(place[0] / "giver")}
        consolidated = [[line for line in log if "consolidated" in line] for log in logs]
        assert consolidated[0] == consolidated[1]
    for words in (
        [],
        ["--resume"],
    ):  # which sweep.py gives: the corrected command finds no folder in its way
        one_line(
            call(*words, "seed=5", "name=other", f"first_task={place[0] / 'giver'}"),
            "seed",
            "cannot stand",
        )
        assert not (place[0] / "other").exists()
    one_line(call("name=grown", f"first_task={place[0] / 'olora_whole'}"), "olora")
    one_line(call("method=si", "name=own", f"first_task={place[0] / 'giver'}"), "method=si")


def test_joint_has_two_rows_and_serves_as_intransigence(lra, place):
    one_line(
        run(
            "train.py",
            "--cfg",
            "configs/ss_cil.yaml",
            *place[1],
            *FAST,
            "name=no",
            f"joint_run={lra[0]}",
        ),
        "no finished joint run",
    )
    assert (
        run(
            "train.py",
            "--cfg",
            "configs/ss_cil.yaml",
            *place[1],
            *FAST,
            "method=joint",
            "name=joint",
        ).returncode
        == 0
    )
    joint = json.loads((place[0] / "joint" / "results.json").read_text())
    assert (
        np.array(joint["matrix"]["J"]).shape == (2, 3)
        and joint["metrics"]["J"]["forgetting"] is None
    )
    done = run(
        "train.py",
        "--cfg",
        "configs/ss_cil.yaml",
        *place[1],
        *FAST,
        "method=frozen",
        "name=frozen",
        f"joint_run={place[0] / 'joint'}",
    )
    assert done.returncode == 0, done.stderr
    frozen = json.loads((place[0] / "frozen" / "results.json").read_text())
    own = [frozen["matrix"]["J"][k + 1][k] for k in range(3)]
    assert frozen["metrics"]["J"]["intransigence"] == pytest.approx(
        np.mean(np.array(joint["matrix"]["J"][1]) - own)
    )
    assert frozen["parameters"]["lora"] == 0


def test_a_run_folder_is_never_overwritten(lra, place):
    before = sorted((p, p.stat().st_mtime_ns) for p in lra[0].rglob("*"))
    one_line(
        run("train.py", "--cfg", "configs/ss_cil.yaml", *place[1], *FAST, "name=lra"),
        "not empty",
        "name=",
    )
    assert sorted((p, p.stat().st_mtime_ns) for p in lra[0].rglob("*")) == before


def test_check_passes_a_good_tree_and_warns_of_what_is_handled(tree, tmp_path):
    done = run("prepare_data.py", "check", "--root", tree)
    assert done.returncode == 0 and "0 errors, 0 warnings" in done.stdout
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    clips = read_s4(root)
    soundfile.write(
        clips[0].audio, np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 2, 2)), 44100
    )
    soundfile.write(clips[1].audio, np.zeros(5 * 16000), 16000)
    done = run("prepare_data.py", "check", "--root", root)
    assert done.returncode == 0 and all(
        what in done.stdout for what in ("44100 Hz", "2 channels", "2.00 s", "silent throughout")
    )
    packed = run(
        "prepare_data.py",
        "pack",
        "--cfg",
        "configs/ss_cil.yaml",
        f"data_root={root}",
        f"cache_dir={tmp_path / 'c'}",
        *TINY,
    )
    assert packed.returncode == 0, packed.stderr


def test_check_finds_a_source_video_in_two_splits(tree, tmp_path):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    data = root / "Single-source"
    csv = data / "s4_meta_data.csv"
    rows = csv.read_text().splitlines()
    old, other = (
        rows[1].split(",")[0],
        next(row for row in rows if row.endswith("test")).split(",")[0],
    )
    for path in sorted(data.rglob(f"{old}*"), reverse=True):
        path.rename(path.with_name(path.name.replace(old, f"{other:<11}".replace(" ", "_") + "_2")))
    for path in sorted(data.rglob(f"{other}*"), reverse=True):
        if "_2" not in path.name[11:]:
            path.rename(
                path.with_name(path.name.replace(other, f"{other:<11}".replace(" ", "_") + "_1"))
            )
    long = f"{other:<11}".replace(" ", "_")
    csv.write_text(
        "\n".join(
            r.replace(old, long + "_2").replace(other, long + "_1")
            if r.split(",")[0] in (old, other)
            else r
            for r in rows
        )
        + "\n"
    )
    done = run("prepare_data.py", "check", "--root", root)
    assert done.returncode == 1 and "a leak" in done.stdout and long in done.stdout


def test_synth_true_makes_the_set_on_first_use(tmp_path, config, monkeypatch):
    from atlas import runs
    from atlas.prepare import synth

    small = lambda root: synth.synth_s4(
        root, size=32, train=1, val=1, test=1, classes=synth.CLASSES[:2], progress=False
    )
    monkeypatch.setitem(runs.SYNTHETIC, "s4", small)
    here = replace(
        config, synth=True, data_root=str(tmp_path / "new"), cache_dir=str(tmp_path / "c")
    )
    assert len(runs.open_data(here)[0].clips) == len(runs.open_data(here)[0].clips) == 6


def test_synth_is_a_command(tmp_path):
    done = run(
        "prepare_data.py",
        "synth",
        "--out",
        tmp_path / "s",
        "--size",
        32,
        "--train",
        1,
        "--val",
        1,
        "--test",
        1,
    )
    assert done.returncode == 0 and len(read_s4(tmp_path / "s")) == 69
    one_line(run("prepare_data.py", "synth", "--out", tmp_path / "s"), "there already")


def test_no_config_and_no_gpu():
    one_line(run("train.py", "--cfg", "nowhere.yaml"), "nowhere.yaml")
    if not torch.cuda.is_available():
        one_line(run("train.py", "--cfg", "configs/ss_cil.yaml", "device=cuda"), "no GPU")


@real
def test_real_photos_sounds_and_weights(tmp_path):
    """compose -> CIL with the pretrained encoders, a step or two of it."""
    data, weights = SHARED / "openavs", SHARED / "weights"
    done = run(
        "prepare_data.py",
        "compose",
        "--voc",
        data / "VOC2012",
        "--davis",
        data / "DAVIS",
        "--esc",
        data / "ESC-50",
        "--out",
        tmp_path / "open",
        "--clips",
        4,
    )
    assert done.returncode == 0 and all(
        f"kept     {name}" in done.stdout for name in ("person", "car", "dog", "motorbike")
    ), done.stderr
    words = [
        f"visual_weights={weights / 'mobilenetv2_100.imagenet.safetensors'}",
        f"audio_weights={weights / 'mobilenetv1_100.yamnet.safetensors'}",
    ]
    words += [
        f"data_root={tmp_path / 'open'}",
        f"out_dir={tmp_path}",
        f"cache_dir={tmp_path / 'c'}",
        "epochs_first=1",
        "epochs=1",
        "image_size=64",
        "width=16",
    ]
    done = run("train.py", "--cfg", "configs/ss_cil.yaml", "configs/open.yaml", *words, "name=run")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [len(t["classes"]) for t in results["tasks"]] == [
        2,
        1,
        1,
    ] and "RANDOM" not in done.stdout


def test_til_learns_a_head_a_task_and_leaves_the_past_ones_alone(place):
    done = run("train.py", "--cfg", "configs/ss_til.yaml", *place[1], *FAST, "name=til")
    assert done.returncode == 0, done.stderr
    states = [
        load_file(place[0] / "til" / f"task_{k:02d}" / "model.safetensors") for k in (1, 2, 3)
    ]
    assert [sum("heads" in name and "weight" in name for name in state) for state in states] == [
        1,
        2,
        3,
    ]
    for k in (1, 2):
        name = f"decoder.heads.{k - 1}.weight"
        assert all(torch.equal(states[k - 1][name], later[name]) for later in states[k:])
        assert not torch.equal(states[k][f"decoder.heads.{k}.weight"], states[k][name])
    again = run("eval.py", place[0] / "til", "--rescore")
    assert again.returncode == 0 and "agrees with" in again.stdout, again.stdout + again.stderr


def test_dil_runs_over_domains(place):
    words = [
        "configs/ss_dil.yaml",
        *place[1],
        *FAST,
        "domains={speech: [male_speech], rest: [baby_laughter, female_singing, dog_barking]}",
        "name=dil",
    ]
    done = run("train.py", "--cfg", *words)
    assert done.returncode == 0, done.stderr
    assert [
        t["name"] for t in json.loads((place[0] / "dil" / "results.json").read_text())["tasks"]
    ] == ["speech", "rest"]


def test_a_closed_pipe_is_no_traceback(lra):
    done = subprocess.run(
        f"{sys.executable} eval.py {lra[0]} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.startswith("lra") and "Traceback" not in done.stderr, done.stderr
