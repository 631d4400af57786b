import concurrent.futures
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run
from safetensors.torch import load_file

from atlas import parallel
from atlas.results import read_results


def torchrun(n, *words):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={n}",
        "train.py",
        *map(str, words),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def forked(n, *words):
    """The same in n forked processes, which need not import torch again: their CompletedProcesses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(n),
        }
    be = lambda rank: os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda rank: run(*words, preexec_fn=lambda: be(rank)), range(n)))


def test_alone_nothing_is_shared():
    x = torch.ones(3)
    assert parallel.summed(x) is x and parallel.summed(2) == 2 and parallel.share(7) == 1
    assert parallel.batches(5, 2) == [[0, 1], [2, 3], [4]] and parallel.mine([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize("n", [2, 3])
def test_shares_of_a_batch_are_its_clips_once_each(monkeypatch, n):
    """Also of a last batch that is smaller than the number of processes: the share of a clip that is only there to take part is 0."""
    monkeypatch.setattr(parallel, "processes", lambda: n)
    seen, total = [], []
    for k in range(n):
        monkeypatch.setattr(parallel, "rank", lambda: k)
        parts = parallel.batches(9, 4)
        shares = [parallel.share(size) for size in (4, 4, 1)]
        assert all(parts) and len(parts) == 3
        seen += [i for part, share in zip(parts, shares) if share for i in part]
        total.append(shares)
    assert sorted(seen) == list(range(9)) and np.allclose(np.sum(total, 0), 1)


STREAM = (
    "protocol=tfcl",
    "lra_trigger=plateau",
    "lra_window=2",
    "lra_peak=0",
    "stream_checkpoints=2",
    "stream_epochs=4",
)


@pytest.mark.parametrize(
    "words, folder",
    [(("lra_lambda=10", "lr_first=0"), "task_01"), ((*STREAM, "lr_first=1e-6"), "task_02")],
    ids=["cil", "tfcl"],
)
def test_two_processes_learn_what_one_does(tree, config, tmp_path, words, folder):
    """Batches of three over two processes, so that shares are unequal: the losses of every epoch (CIL: over 20 steps) agree to 1e-5, and so do anchor and sensitivity.

    These are compared after no step, or small ones: what differs in rounding, Adam turns into whole steps wherever a gradient is next to nothing.
    """
    words = [
        *TINY,
        *words,
        f"data_root={tree}",
        f"cache_dir={config.cache_dir}",
        f"out_dir={tmp_path}",
        "batch_size=3",
        "epochs_first=1",
        "epochs=9",
        "lr=1e-4",
        "device=cpu",
    ]
    one, first, second = (
        run("train.py", *words, "name=one"),
        *forked(2, "train.py", *words, "name=two"),
    )
    assert one.returncode == first.returncode == second.returncode == 0, (
        one.stderr + first.stderr + second.stderr
    )
    assert "NOTE: the visual encoder" in first.stdout and not second.stdout  # one of them speaks
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        for part in {"raw", "weighted", "window"} & a.keys():
            assert {k: v for k, v in a[part].items() if isinstance(v, float)} == pytest.approx(
                {k: v for k, v in b[part].items() if isinstance(v, float)}, abs=1e-5, rel=1e-5
            ), a["task"]
    results = [read_results(tmp_path / name) for name in ("one", "two")]
    assert [r["environment"]["processes"] for r in results] == [1, 2] and results[0][
        "consolidations"
    ] == results[1]["consolidations"]
    for matrix in results[0]["matrix"]:
        np.testing.assert_allclose(
            *[np.array(r["matrix"][matrix], dtype=float) for r in results],
            atol=2e-3,
            err_msg=matrix,
        )  # a pixel at logit 0 may fall either way
    states = [load_file(tmp_path / name / folder / "method.safetensors") for name in ("one", "two")]
    for name in ("anchor", "sensitivity"):
        a, b = (state[name] for state in states)
        assert a.any() and (a - b).norm() <= 1e-5 * a.norm(), name


def test_an_error_of_one_process_ends_them_all(tree, config, tmp_path):
    done = torchrun(
        2,
        *TINY,
        f"data_root={tree}",
        f"cache_dir={config.cache_dir}",
        f"out_dir={tmp_path}",
        "lr=1e30",
        "lr_first=1e30",
        "epochs_first=3",
        "device=cpu",
    )
    assert done.returncode != 0 and "the loss is not finite" in done.stderr
