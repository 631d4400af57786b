"""A run that is killed and resumed ends in the very matrices of one that was not."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, run

WORDS = [*TINY, "batch_size=2", "epochs_first=3", "epochs=2", "lr_first=1e-3", "lr=1e-3", "method=lra", "lora_dropout=0.1", "augment=true"]


@pytest.fixture(scope="module")
def words(tree, tmp_path_factory):
    where = tmp_path_factory.mktemp("resume")
    return where, ["train.py", "--cfg", "configs/ss_cil.yaml", f"data_root={tree}", f"out_dir={where}", f"cache_dir={where / 'cache'}", *WORDS]


@pytest.fixture(scope="module")
def whole(words):
    done = run(*words[1], "name=whole")
    assert done.returncode == 0, done.stderr
    return words[0] / "whole"


def killed_when(command, condition):
    """Start a process and SIGKILL it as soon as `condition()` holds; False if it ended before."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def lines(path):
    return path.read_text().splitlines() if path.is_file() else []


MOMENTS = {
    "in the first epoch": lambda f: (f / "results.json").is_file(),
    "in a later epoch": lambda f: len(lines(f / "log.jsonl")) >= 2,
    "in a consolidation": lambda f: len(lines(f / "log.jsonl")) >= 3,
    "in a checkpoint": lambda f: any(f.glob(".task_*")),
    "in an evaluation": lambda f: (f / "task_02").is_dir(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bits(words, whole, moment):
    folder, name = words[0] / moment.replace(" ", "_"), f"name={moment.replace(' ', '_')}"
    assert killed_when([*words[1], name], lambda: MOMENTS[moment](folder)), "it was not killed in time"
    assert not json.loads((folder / "results.json").read_text())["complete"]
    done = run(*words[1], name, "--resume")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((f / "results.json").read_text()) for f in (whole, folder))
    assert first["matrix"] == second["matrix"] and first["val_matrix"] == second["val_matrix"] and first["metrics"] == second["metrics"]
    steps = lambda f: [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines(f / "log.jsonl")]
    assert steps(whole) == steps(folder)


def test_resuming_a_finished_run_prints_its_table(words, whole):
    done = run(*words[1], "name=whole", "--resume")
    assert done.returncode == 0 and "is finished" in done.stdout and "forgetting" in done.stdout


def test_resuming_under_another_config_is_refused(words, whole):
    done = run(*words[1], "name=whole", "lr=2e-3", "--resume")
    assert done.returncode == 2 and "lr (0.001 there, 0.002 here)" in done.stderr and "Traceback" not in done.stderr


def test_resume_where_there_is_nothing_starts(words):
    done = run(*words[1], "name=new", "epochs_first=0", "epochs=0", "--resume")
    assert done.returncode == 0, done.stderr


def test_a_folder_in_use_is_locked(words, whole):
    with open(whole / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(*words[1], "name=whole", "--resume")
    assert done.returncode == 2 and "in use" in done.stderr
