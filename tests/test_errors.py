"""Bad input: one clear line, no traceback, a non-zero exit, nothing lost.

Broken files are in test_clips.py, test_audio.py and test_check.py; interrupted runs in
test_resume.py.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LIGHT, ROOT, TINY, one_line, run

import train
from atlas.clips import read_s4
from atlas.config import load_config
from atlas.errors import AtlasError, explained
from atlas.runs import read_run

FAST = [
    *TINY,
    f"visual={LIGHT}",
    "batch_size=2",
    "epochs_first=1",
    "epochs=1",
    "lr_first=1e-3",
    "lr=1e-3",
    "lra_clips=2",
]


def script(body, stdout=subprocess.PIPE, **environment):
    """A small script behind the gate, in a process of its own."""
    code = (
        "import os, sys\n"
        "from atlas.errors import AtlasError, one_line_errors, prepare_process\n"
        "prepare_process()\n"
        f"with one_line_errors():\n    {body}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "body, code, line",
    [
        ("raise AtlasError('two\\nlines')", 2, "error: two lines"),
        ("raise KeyboardInterrupt", 130, "error: stopped by Ctrl-C"),
        ("open('/nowhere/file')", 1, "error: /nowhere/file: No such file or directory; check"),
        ("open('/dev/null/file')", 1, "error: /dev/null/file: Not a directory; a file stands"),
        ("open('/')", 1, "error: /: Is a directory; a file stands"),
        ("open('x' * 300)", 1, "choose a shorter name"),
        ("raise MemoryError", 1, "error: out of memory"),
        ("raise RuntimeError('CUDA out of memory. Tried')", 1, "lower batch_size"),
        ("raise RuntimeError('DataLoader worker (pid 7) is killed')", 1, "or workers"),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_what_is_no_bug_is_one_line(body, code, line):
    done = script(body)
    assert done.returncode == code and line in done.stderr, done.stderr
    assert done.stderr.count("\n") == bool(line)


def test_a_bug_keeps_its_traceback():
    assert "Traceback" in script("raise RuntimeError('a bug')").stderr
    assert "Traceback" in script("{}['key']").stderr


def test_every_error_of_a_file_says_what_to_do():
    for number in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO, errno.EMFILE, errno.ESTALE):
        line = explained(OSError(number, os.strerror(number), "some/file"))
        assert line.startswith(f"some/file: {os.strerror(number)}; "), line
    assert "free some space" in explained(OSError(errno.ENOSPC, "full", "file"))
    assert explained(OSError("the hub is out of reach")).startswith("the hub is out of reach; ")


def test_a_closed_pipe_does_not_end_the_work(tmp_path):
    """`train.py | head`: the reader goes after a line, and all of the work is done."""
    reader, writer = os.pipe()
    os.close(reader)
    done = script(f"[print(k) for k in range(9)]; open(r'{tmp_path}/end', 'w')", writer)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "end").exists()
    assert done.stderr == "note: nobody reads the output any more; the work goes on\n"


def test_a_stdout_that_is_full_is_a_line():
    with open("/dev/full", "w") as full:
        done = script("print('R')", full)
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and "free some space" in done.stderr
    )


def test_a_terminal_without_utf_8_gets_what_it_can_show():
    done = script("print('\\u00b1 1')", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (done.returncode, done.stdout, done.stderr) == (0, "? 1\n", "")


def test_waiting_threads_spin_for_a_short_time_unless_the_user_says_otherwise():
    body = "print(os.environ.get('GOMP_SPINCOUNT'))"
    assert script(body).stdout == "10000\n"
    assert script(body, OMP_WAIT_POLICY="ACTIVE").stdout == "None\n"
    assert script(body, GOMP_SPINCOUNT="7").stdout == "7\n"


# ---- through train.py ----------------------------------------------------------------------------


def words_of(root, where, *words):
    places = [f"data_root={root}", f"out_dir={where / 'r'}", f"cache_dir={where / 'c'}"]
    return [*places, *FAST, *words]


def learn(root, where, *words):
    """train.py in this process; the text of an AtlasError is its one line."""
    train.main(load_config([str(ROOT / "configs/ss_cil.yaml")], words_of(root, where, *words)))


def refuses(work, *words):
    with pytest.raises(AtlasError) as error:
        work()
    assert all(str(word) in str(error.value) for word in words), error.value


def test_a_damaged_tree_is_one_line_and_makes_no_run(tree, tmp_path):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    path = Path(read_s4(root)[0].frames[1])
    path.write_bytes(path.read_bytes()[:300])
    command = ["train.py", "--cfg", "configs/ss_cil.yaml", *words_of(root, tmp_path)]
    one_line(run(*command), path.name, "prepare_data.py check")
    assert not (tmp_path / "r").exists() and not list((tmp_path / "c").glob("[!.]*"))
    report = run("prepare_data.py", "check", "--root", root)
    assert report.returncode == 1 and path.name in report.stdout and "1 errors" in report.stdout


def test_a_loss_that_is_not_finite_stops_the_run_and_names_terms_and_clips(tree, tmp_path):
    words = ["lr_first=1e30", "grad_clip=0", "warmup=0", "weight_decay=0"]
    named = ["not finite", "bce", "dice", "penalty", "clips of the batch: s", "lower lr"]
    refuses(lambda: learn(tree, tmp_path, *words), *named)


WRONG = [
    (["data_root=nowhere"], ["nowhere", "data_root"]),
    (
        ["dataset=ms3", "protocol=tfcl", "lra_trigger=plateau"],
        ["ms3_meta_data.csv", "Multi-sources"],
    ),
    (["lora_rnk=8"], ["lora_rnk", "lora_rank"]),
    (["protocol=dil", "domains={speech: [male_speech]}"], ["missing: baby_laughter", "domains"]),
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


@pytest.mark.parametrize("words, named", WRONG, ids=lambda words: words[-1])
def test_a_wrong_word_is_one_line(tree, tmp_path, words, named):
    refuses(lambda: learn(tree, tmp_path, *words), *named)


def test_a_checkpoint_of_another_model_is_refused(tree, tmp_path):
    learn(tree, tmp_path, "method=finetune", "name=run", "base=4", "epochs=0", "epochs_first=0")
    folder = tmp_path / "r" / "run"
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lora_rank: 2", "lora_rank: 4"))
    refuses(lambda: read_run(folder).load_task(1), "task_01")
    one_line(run("eval.py", "nowhere"), "nowhere")
