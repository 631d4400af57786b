"""Bad input, through the command line: one clear line, no traceback, a non-zero exit, nothing lost. Interrupted runs are in test_resume.py."""

import concurrent.futures
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import TINY, one_line, run
from PIL import Image

from atlas.clips import read_s4

FAST = [
    *TINY,
    "batch_size=2",
    "epochs_first=1",
    "epochs=1",
    "lr_first=1e-3",
    "lr=1e-3",
    "lra_clips=2",
]


def train(root, tmp_path, *words, cfg="configs/ss_cil.yaml"):
    return run(
        "train.py",
        "--cfg",
        cfg,
        f"data_root={root}",
        f"out_dir={tmp_path / 'r'}",
        f"cache_dir={tmp_path / 'c'}",
        *FAST,
        *words,
    )


DAMAGES = {
    "missing frame": lambda clip: Path(clip.frames[1]),
    "truncated frame": lambda clip: Path(clip.frames[1]),
    "mask value": lambda clip: Path(clip.masks[0]),
    "mask size": lambda clip: Path(clip.masks[0]),
    "no sound": lambda clip: Path(clip.audio),
    "broken sound": lambda clip: Path(clip.audio),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tree_is_one_line_for_train_and_a_report_for_check(tree, tmp_path, damage):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    path = DAMAGES[damage](read_s4(root)[0])
    if damage == "truncated frame":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "mask value":
        Image.fromarray(np.full((32, 32), 130, np.uint8)).save(path)
    elif damage == "mask size":
        Image.fromarray(np.full((16, 32), 255, np.uint8)).save(path)
    elif damage == "broken sound":
        path.write_bytes(b"RIFF, or so it says")
    else:
        path.unlink()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done, report = (
            pool.submit(train, root, tmp_path),
            pool.submit(run, "prepare_data.py", "check", "--root", root),
        )
    done, report = done.result(), report.result()
    one_line(done, path.name, "prepare_data.py check")
    assert not (tmp_path / "r").exists() and not list((tmp_path / "c").glob("*"))
    assert report.returncode == 1 and path.name in report.stdout and "1 errors" in report.stdout


def test_silent_short_stereo_and_44_khz_sounds_are_handled(tree, tmp_path):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    silent, short, stereo, fast = read_s4(root)[:4]
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 5, 2))
    soundfile.write(silent.audio, np.zeros(5 * 16000), 16000)
    soundfile.write(short.audio, noise[:3000, 0], 16000)
    soundfile.write(stereo.audio, noise[: 5 * 16000], 16000)
    soundfile.write(fast.audio, noise[:, 0], 44100)
    done = train(root, tmp_path, "method=finetune", "name=run")
    assert done.returncode == 0, done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_terms_and_clips(tree, tmp_path):
    done = train(tree, tmp_path, "lr_first=1e30", "grad_clip=0", "warmup=0", "weight_decay=0")
    one_line(done, "not finite", "bce", "dice", "penalty", "clips of the batch: s", "lower lr")


WRONG = [
    (["data_root=nowhere"], ["nowhere", "data_root"]),
    (
        ["dataset=ms3", "protocol=tfcl", "lra_trigger=plateau"],
        ["ms3_meta_data.csv", "Multi-sources"],
    ),
    (["lora_rnk=8"], ["lora_rnk", "lora_rank"]),
    (["protocol=dil", "domains={speech: [male_speech]}"], ["in none: baby_laughter", "domains"]),
    (["class_order=[male_speech]"], ["class_order", "baby_laughter"]),
    (["dataset=ms3"], ["protocol=cil", "protocol=tfcl"]),
    (["protocol=tfcl"], ["lra_trigger=plateau"]),
    (["protocol=tfcl", "method=finetune", "classify=true"], ["classify"]),
    (["protocol=tfcl", "method=finetune", "stream_checkpoints=9"], ["stream_checkpoints=9"]),
    (["visual=pvt_v9"], ["pvt_v9"]),
    (["visual_weights=none.safetensors"], ["none.safetensors"]),
    (["lora_targets=nothing_like_it"], ["lora_targets"]),
    (["joint_run=nowhere"], ["nowhere"]),
]


@pytest.fixture(scope="module")
def answers(tree, tmp_path_factory):
    """What train.py says to each of WRONG; two processes at a time."""
    where = tmp_path_factory.mktemp("wrong")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(lambda k: train(tree, where / str(k), *WRONG[k][0]), range(len(WRONG)))
        )


@pytest.mark.parametrize("k", range(len(WRONG)), ids=lambda k: WRONG[k][0][-1])
def test_a_wrong_word_is_one_line(answers, k):
    one_line(answers[k], *WRONG[k][1])


def test_a_checkpoint_of_another_model_is_refused(tree, tmp_path):
    assert (
        train(
            tree, tmp_path, "method=finetune", "name=run", "epochs=0", "epochs_first=0"
        ).returncode
        == 0
    )
    config = tmp_path / "r" / "run" / "config.yaml"
    config.write_text(config.read_text().replace("lora_rank: 2", "lora_rank: 4"))
    one_line(run("eval.py", tmp_path / "r" / "run", "--rescore"), "task_01")
    one_line(run("eval.py", "nowhere"), "nowhere")
