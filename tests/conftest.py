"""Shared by the tests: a small synthetic set, made once, and the real data where it is at hand."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no network in a test

import torch

from atlas.config import load_config
from atlas.lra import Delta
from atlas.prepare.synth import CLASSES, make_set

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
LIGHT = "test_convnext"  # an encoder of timm's that learns in half of pvt_v2_b0's time


def pair_of(rank=2, wide=4, out=3, seed=0):
    """One LoRA layer of random factors, on a weight of zeros."""

    def draw(*shape):
        generator = torch.Generator().manual_seed(seed)
        return torch.nn.Parameter(torch.randn(*shape, generator=generator))

    frozen = torch.nn.Parameter(torch.zeros(out, wide), requires_grad=False)
    return Delta(draw(rank, wide), draw(out, rank), frozen, 0.5)


def run(*words, preexec_fn=lambda: None, stop=lambda: None):
    """A script in a process of its own: the CompletedProcess, with stdout and stderr as text.

    It is forked from this one, which has torch imported already. stop(): the signal to send it, as
    soon as it is not None.
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
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def script(words, out, err, preexec_fn):
    """Be `python WORDS...` in the project's folder, and return its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdin = open(os.devnull)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
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
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def one_line(done, *words):
    """The process ended in one clear error line that holds all of `words`."""
    assert done.returncode not in (0, None), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert all(str(word) in errors[0] for word in words), done.stderr


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The root of a synthetic S4 of four classes: 4 train, 2 val, 2 test clips each, 32 px."""
    root = tmp_path_factory.mktemp("data") / "s4"
    names = list(CLASSES[:4])
    return make_set("s4", root, size=32, train=4, val=2, test=2, classes=names)


@pytest.fixture(scope="session")
def ms3_tree(tmp_path_factory):
    """The root of a synthetic MS3 of six classes: 24 train, 4 val, 8 test clips, 32 px."""
    root = tmp_path_factory.mktemp("data") / "ms3"
    names = list(CLASSES[:6])
    return make_set("ms3", root, size=32, train=24, val=4, test=8, classes=names)


@pytest.fixture(scope="session")
def config(tree, tmp_path_factory):
    """A config of CIL over `tree`: an epoch a task, two batches in the first."""
    words = [
        *TINY,
        f"data_root={tree}",
        f"cache_dir={tmp_path_factory.mktemp('cache')}",
        "batch_size=4",
        "epochs=1",
        "epochs_first=1",
        "lr=1e-3",
        "lr_first=1e-3",
    ]
    return load_config([], words)


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
def til_run(config, tmp_path_factory):
    """The folder of a tiny TIL run of 3 tasks, with a head each."""
    import train

    where = tmp_path_factory.mktemp("til")
    train.main(replace(config, protocol="til", out_dir=str(where), name="run"))
    return where / "run"
