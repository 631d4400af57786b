"""Shared by the tests: a small synthetic set, made once, and the real data where it is at hand."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no network in a test

import torch

from atlas.config import load_config
from atlas.synth import CLASSES, synth_s4
from atlas.synth_ms3 import synth_ms3

SHARED = ROOT.parent / "shared"  # real photos, sounds and weights, where there are any
real = pytest.mark.skipif(not SHARED.exists(), reason="no real data beside the project")
torch.set_num_threads(1)

TINY = ["visual=pvt_v2_b0", "visual_weights=false", "audio=logmel", "image_size=32", "width=16", "heads=2", "lora_rank=2", "base=2", "step=1"]


def run(*words, **options):
    """A script in its own process: the CompletedProcess, with stdout and stderr as text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=environment, **options)


def one_line(done, *words):
    """The process ended in one clear error line that holds all of `words`."""
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stderr
    error = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and all(str(word) in error[0] for word in words), done.stderr


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The root of a synthetic S4 of four classes: 4 train, 2 val, 2 test clips each, 32 px."""
    return synth_s4(tmp_path_factory.mktemp("data") / "s4", size=32, train=4, val=2, test=2, classes=list(CLASSES[:4]), progress=False)


@pytest.fixture(scope="session")
def ms3_tree(tmp_path_factory):
    """The root of a synthetic MS3 of six classes: 24 train, 4 val, 8 test clips, 32 px."""
    return synth_ms3(tmp_path_factory.mktemp("data") / "ms3", size=32, train=24, val=4, test=8, classes=list(CLASSES[:6]), progress=False)


@pytest.fixture(scope="session")
def config(tree, tmp_path_factory):
    where = [f"data_root={tree}", f"cache_dir={tmp_path_factory.mktemp('cache')}"]
    return load_config([], [*TINY, *where, "batch_size=4", "epochs=1", "epochs_first=1", "lr=1e-3", "lr_first=1e-3"])


@pytest.fixture(scope="session")
def cache(config):
    from atlas.runs import open_data

    return open_data(config)[0]


@pytest.fixture(scope="session")
def tasks(cache, config):
    """The CIL tasks of `config`: 2, 1 and 1 classes."""
    from atlas.protocols import class_incremental

    return class_incremental(cache, config)
