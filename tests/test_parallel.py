"""One model trained by several processes: shares of a batch, and torchrun."""

import concurrent.futures
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch.distributed.run
from conftest import LIGHT, TINY, run
from safetensors.torch import load_file

from atlas import parallel
from atlas.folder import Journal
from atlas.results import read_results


def forked(n, *words):
    """train.py as torchrun starts it, in n forked processes, which need not import torch again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def started(rank):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
        where |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run("train.py", *words, preexec_fn=lambda: os.environ.update(where))

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(started, range(n)))


def test_alone_nothing_is_shared():
    x = np.ones(3)
    assert parallel.summed(x) is x and parallel.summed(2) == 2
    assert parallel.gathered(x) == [x] and parallel.share(7) == 1
    assert parallel.batches(5, 2) == [[0, 1], [2, 3], [4]]
    assert parallel.mine([1, 2, 3]) == [1, 2, 3]
    assert parallel.in_turn(lambda: 7) == parallel.first_only(lambda: 7)() == 7


@pytest.mark.parametrize("n", [2, 3])
def test_shares_of_a_batch_are_its_clips_once_each(monkeypatch, n):
    """Also of a last batch that is smaller than the number of processes.

    The share of a clip that is only there so that its process takes part is 0.
    """
    monkeypatch.setattr(parallel, "processes", lambda: n)
    seen = []
    total = []
    for k in range(n):
        monkeypatch.setattr(parallel, "rank", lambda k=k: k)
        parts = parallel.batches(9, 4)
        shares = [parallel.share(size) for size in (4, 4, 1)]
        assert all(parts) and len(parts) == 3
        seen += [i for part, share in zip(parts, shares) if share for i in part]
        total.append(shares)
    assert sorted(seen) == list(range(9))
    assert np.allclose(np.sum(total, 0), 1)


def test_only_the_first_process_writes(monkeypatch):
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert parallel.first_only(lambda: 7)() is None
    assert parallel.quiet() is True


STREAM = (
    "protocol=tfcl",
    "lra_trigger=plateau",
    "lra_window=2",
    "lra_peak=0",
    "stream_checkpoints=2",
    "stream_epochs=2",
)


@pytest.mark.parametrize(
    "words, folder",
    [(("lra_lambda=10", "lr_first=0"), "task_01"), ((*STREAM, "lr_first=1e-6"), "task_02")],
    ids=["cil", "tfcl"],
)
def test_two_processes_learn_what_one_does(tree, config, tmp_path, words, folder):
    """Batches of three over two processes, so that shares are unequal: the losses of every epoch
    (CIL: over 9 steps) agree to 1e-5, and so do anchor, importance and consolidations.

    These are compared after no step, or small ones: what differs in rounding, Adam turns into
    whole steps wherever a gradient is next to nothing.
    """
    words = [
        *TINY,
        *words,
        f"visual={LIGHT}",
        f"data_root={tree}",
        f"cache_dir={config.cache_dir}",
        f"out_dir={tmp_path}",
        "step=2",
        "batch_size=3",
        "epochs_first=1",
        "epochs=3",
        "lr=1e-4",
        "device=cpu",
    ]
    one = run("train.py", *words, "name=one")
    first, second = forked(2, *words, "name=two")
    for done in (one, first, second):
        assert done.returncode == 0, done.stderr
    assert "NOTE: the visual encoder" in first.stdout and not second.stdout  # one of them speaks
    folders = (Path(tmp_path, "one"), Path(tmp_path, "two"))
    logs = [Journal(path).lines() for path in folders]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for part in {"raw", "weighted", "window"} & a.keys():
            told = [{k: v for k, v in x[part].items() if isinstance(v, float)} for x in (a, b)]
            assert told[0] == pytest.approx(told[1], abs=1e-5, rel=1e-5), a["task"]
    results = [read_results(path) for path in folders]
    assert [found["environment"]["processes"] for found in results] == [1, 2]
    assert results[0]["consolidations"] == results[1]["consolidations"]
    assert results[0]["consolidations"] or folder == "task_01"
    for score in results[0]["matrix"]:  # a pixel at logit 0 may fall either way
        pair = [np.array(found["matrix"][score], dtype=float) for found in results]
        np.testing.assert_allclose(*pair, atol=2e-3, err_msg=score)
    states = [load_file(path / folder / "method.safetensors") for path in folders]
    for name in ("anchor", "importance"):
        a, b = (state[name] for state in states)
        assert a.any() and (a - b).norm() <= 1e-5 * a.norm(), name


def test_an_error_of_one_process_ends_them_all(tree, config, tmp_path):
    """Through torchrun itself."""
    words = [
        *TINY,
        f"visual={LIGHT}",
        f"data_root={tree}",
        f"cache_dir={config.cache_dir}",
        f"out_dir={tmp_path}",
        "lr=1e30",
        "lr_first=1e30",
        "epochs_first=3",
        "device=cpu",
    ]
    torchrun = [torch.distributed.run.__file__, "--standalone", "--nproc_per_node=2"]
    done = run(
        *torchrun,
        "train.py",
        *words,
        preexec_fn=lambda: os.environ.update(OMP_NUM_THREADS="1"),
    )
    assert done.returncode != 0 and "the loss is not finite" in done.stderr
