"""Shared by the tests: a small synthetic set, made once, and the real data where it is at hand."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no network in a test

import torch

from atlas.config import as_dict, load_config
from atlas.lra import Delta
from atlas.prepare.synth import CLASSES, synth_s4
from atlas.prepare.synth_ms3 import synth_ms3

SHARED = ROOT.parent / "shared"  # real photos, sounds and weights, where there are any
real = pytest.mark.skipif(not SHARED.exists(), reason="no real data beside the project")
torch.set_num_threads(1)

TINY = [
    "visual=pvt_v2_b0",
    "visual_weights=false",
    "audio=logmel",
    "image_size=32",
    "width=16",
    "heads=2",
    "lora_rank=2",
    "base=2",
    "step=1",
]


def pair_of(rank=2, wide=4, out=3, seed=0):
    """One LoRA layer of random factors, on a weight of zeros."""
    draw = lambda *shape: torch.nn.Parameter(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    )
    return Delta(
        draw(rank, wide),
        draw(out, rank),
        torch.nn.Parameter(torch.zeros(out, wide), requires_grad=False),
        0.5,
    )


def run(*words, preexec_fn=lambda: None, stop=lambda: None):
    """A script in a process of its own: the CompletedProcess, with stdout and stderr as text. It is forked from this one, which has torch imported already.

    stop(): the signal to send it, as soon as it is not None.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os._exit(script([str(word) for word in words], out, err, preexec_fn))
        ended = 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and (sent := stop()):
                os.kill(child, sent)
                ended, status = os.waitpid(child, 0)
            time.sleep(0.002)
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(
            words, os.waitstatus_to_exitcode(status), out.read(), err.read()
        )


def script(words, out, err, preexec_fn):
    """Be `python WORDS...` in the project's folder, and return its exit status."""
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    sys.stdin, sys.stdout, sys.stderr = (
        open(os.devnull),
        open(1, "w", closefd=False),
        open(2, "w", closefd=False),
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
    os.chdir(ROOT)
    sys.argv = words
    code = 0
    try:
        preexec_fn()
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(*([end.code] if isinstance(end.code, str) else []), end="", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return code


def one_line(done, *words):
    """The process ended in one clear error line that holds all of `words`."""
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stderr
    error = [
        line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")
    ]
    assert len(error) == 1 and all(str(word) in error[0] for word in words), done.stderr


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The root of a synthetic S4 of four classes: 4 train, 2 val, 2 test clips each, 32 px."""
    return synth_s4(
        tmp_path_factory.mktemp("data") / "s4",
        size=32,
        train=4,
        val=2,
        test=2,
        classes=list(CLASSES[:4]),
        progress=False,
    )


@pytest.fixture(scope="session")
def ms3_tree(tmp_path_factory):
    """The root of a synthetic MS3 of six classes: 24 train, 4 val, 8 test clips, 32 px."""
    return synth_ms3(
        tmp_path_factory.mktemp("data") / "ms3",
        size=32,
        train=24,
        val=4,
        test=8,
        classes=list(CLASSES[:6]),
        progress=False,
    )


@pytest.fixture(scope="session")
def config(tree, tmp_path_factory):
    where = [f"data_root={tree}", f"cache_dir={tmp_path_factory.mktemp('cache')}"]
    return load_config(
        [],
        [*TINY, *where, "batch_size=4", "epochs=1", "epochs_first=1", "lr=1e-3", "lr_first=1e-3"],
    )


@pytest.fixture(scope="session")
def cache(config):
    from atlas.runs import open_data

    return open_data(config)[0]


@pytest.fixture(scope="session")
def tasks(cache, config):
    """The CIL tasks of `config`: 2, 1 and 1 classes."""
    from atlas.protocols import class_incremental

    return class_incremental(cache, config)


@pytest.fixture(scope="session")
def til_run(config, tree, tmp_path_factory):
    """The folder of a tiny TIL run of 3 tasks, with a head each."""
    where = tmp_path_factory.mktemp("til")
    words = [
        f"{key}={'null' if value is None else value}"
        for key, value in as_dict(config).items()
        if key not in ("name", "out_dir", "protocol")
    ]
    done = run("train.py", *words, "protocol=til", f"out_dir={where}", "name=run")
    assert done.returncode == 0, done.stderr
    return where / "run"
