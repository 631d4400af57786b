"""A run that is killed and resumed ends in the very matrices of one that was not."""

import fcntl
import functools
import json
import resource
import signal

import pytest
from conftest import TINY, one_line, run

WORDS = [
    *TINY,
    "batch_size=2",
    "epochs_first=3",
    "epochs=2",
    "lr_first=1e-3",
    "lr=1e-3",
    "method=lra",
    "lora_dropout=0.1",
    "augment=true",
    "lra_clips=3",
]
STREAM = [
    "protocol=tfcl",
    "stream_checkpoints=2",
    "lra_trigger=plateau",
    "lra_window=2",
    "lra_peak=0.1",
    "stream_epochs=4",
    "warmup=0.5",
]


@pytest.fixture(scope="module")
def wholes(tree, tmp_path_factory):
    """protocol -> (folder, command) of runs, with the uninterrupted one in folder/whole; made once each."""

    @functools.cache
    def made(protocol):
        where = tmp_path_factory.mktemp("resume")
        own = STREAM if protocol == "tfcl" else []
        command = [
            "train.py",
            "--cfg",
            "configs/ss_cil.yaml",
            f"data_root={tree}",
            f"out_dir={where}",
            f"cache_dir={where / 'cache'}",
            *WORDS,
            *own,
        ]
        done = run(*command, "name=whole")
        assert done.returncode == 0, done.stderr
        results = json.loads((where / "whole" / "results.json").read_text())
        assert results["protocol"] == "cil" or results["consolidations"]
        return where, command

    return made


@pytest.fixture
def words(request, wholes):
    return wholes(request.param)


@pytest.fixture
def whole(words):
    return words[0] / "whole"


def stopped_when(command, condition, how=signal.SIGKILL):
    """Run a script and send it `how` as soon as `condition()` holds: (exit code, stderr)."""
    done = run(*command, stop=lambda: how if condition() else None)
    assert done.returncode, "it was not stopped in time"
    return done.returncode, done.stderr


def lines(path):
    return path.read_text().splitlines() if path.is_file() else []


MOMENTS = {
    "in the first epoch": lambda f: (f / "results.json").is_file(),
    "in a later epoch": lambda f: len(lines(f / "log.jsonl")) >= 2,
    "in a consolidation": lambda f: len(lines(f / "log.jsonl")) >= 3,
    "in a checkpoint": lambda f: any(f.glob(".task_*")),
    "in an evaluation": lambda f: (f / "task_02").is_dir(),
}


def same(whole, folder):
    """The two runs have the same matrices, metrics and log, to the bit."""
    first, second = (json.loads((f / "results.json").read_text()) for f in (whole, folder))
    assert second["complete"]
    for key in ("matrix", "val_matrix", "metrics", "consolidations"):
        assert first[key] == second[key], key
    steps = lambda f: [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in lines(f / "log.jsonl")
    ]
    assert steps(whole) == steps(folder)


@pytest.mark.parametrize(
    "words, moment",
    [
        *(("cil", moment) for moment in MOMENTS),
        ("tfcl", "in a later epoch"),
        ("tfcl", "in an evaluation"),
    ],
    indirect=["words"],
)
def test_a_killed_run_resumes_to_the_same_bits(words, whole, moment):
    folder, name = words[0] / moment.replace(" ", "_"), f"name={moment.replace(' ', '_')}"
    stopped_when([*words[1], name], lambda: MOMENTS[moment](folder))
    assert not json.loads((folder / "results.json").read_text())["complete"]
    done = run(*words[1], name, "--resume")
    assert done.returncode == 0, done.stderr
    same(whole, folder)


@pytest.mark.parametrize("words", ["tfcl"], indirect=True)
def test_ctrl_c_is_one_line_and_keeps_what_is_finished(words, whole):
    folder = words[0] / "ctrl_c"
    code, error = stopped_when(
        [*words[1], "name=ctrl_c"], lambda: len(lines(folder / "log.jsonl")) >= 2, signal.SIGINT
    )
    assert code == 130 and "Traceback" not in error and "--resume" in error, error
    assert run(*words[1], "name=ctrl_c", "--resume").returncode == 0
    same(whole, folder)


@pytest.mark.parametrize("words", ["cil"], indirect=True)
def test_a_full_disk_is_one_line_and_keeps_the_last_good_state(words, whole):
    """No file may grow beyond 100 kB: the first checkpoint of any kind cannot be written."""
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    one_line(run(*words[1], "name=full", preexec_fn=limited), "--resume")
    assert json.loads((words[0] / "full" / "results.json").read_text())["matrix"]["J"] and not list(
        (words[0] / "full").glob("task_*")
    )
    assert run(*words[1], "name=full", "--resume").returncode == 0
    same(whole, words[0] / "full")


@pytest.mark.parametrize("words", ["cil"], indirect=True)
def test_a_checkpoint_interrupted_in_writing_is_ignored(words, whole):
    folder, name = words[0] / "half", "name=half"
    stopped_when([*words[1], name], lambda: (folder / "task_01").is_dir())
    for half in (
        folder / ".task_02.1.tmp",
        folder / "task_02",
    ):  # the second: written whole, but its scores were not
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half of it")
    (folder / ".progress.tmp").write_bytes(b"half of it")
    done = run(*words[1], name, "--resume")
    assert done.returncode == 0, done.stderr
    same(whole, folder)


@pytest.mark.parametrize("words", ["cil"], indirect=True)
def test_resuming_a_finished_run_prints_its_table(words, whole):
    done = run(*words[1], "name=whole", "--resume")
    assert done.returncode == 0 and "is finished" in done.stdout and "forgetting" in done.stdout


@pytest.mark.parametrize("words", ["cil"], indirect=True)
def test_resuming_under_another_config_is_refused(words, whole):
    done = run(*words[1], "name=whole", "lr=2e-3", "--resume")
    assert (
        done.returncode == 2
        and "lr (0.001 there, 0.002 here)" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_resume_where_there_is_nothing_starts(tree, tmp_path):
    where = [f"data_root={tree}", f"out_dir={tmp_path}", f"cache_dir={tmp_path}"]
    done = run(
        "train.py",
        "--cfg",
        "configs/ss_cil.yaml",
        *where,
        *WORDS,
        "name=new",
        "epochs_first=0",
        "epochs=0",
        "--resume",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", ["cil"], indirect=True)
def test_a_folder_in_use_is_locked(words, whole):
    with open(whole / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(*words[1], "name=whole", "--resume")
    assert done.returncode == 2 and "in use" in done.stderr
