import json
import shlex

import pytest
from conftest import TINY, run

from atlas import sweep
from atlas.errors import AtlasError


def test_the_grid_is_every_combination():
    assert sweep.grid(["a=1,2", "b=x"]) == [
        {"a": "1", "b": "x"},
        {"a": "2", "b": "x"},
    ] and sweep.grid([]) == [{}]
    with pytest.raises(AtlasError, match="lonely"):
        sweep.grid(["a=1", "lonely"])


def test_a_first_task_is_that_of_the_seed_and_names_no_folder():
    given = type("Given", (), {"out": "o"})
    (point,) = sweep.grid(["seed=3", "first_task=runs/first/method=finetune,seed={seed}"])
    assert sweep.words_of(point, given) == [
        "seed=3",
        "first_task=runs/first/method=finetune,seed=3",
        "out_dir=o",
        "name=seed=3",
    ]


def test_the_table_ranks_by_validation_and_averages_seeds(tmp_path):
    given = type("Given", (), {"out": tmp_path})
    points = sweep.grid(["lr=1,2", "seed=0,1"])
    for point in points:
        folder = sweep.folder_of(point, given)
        folder.mkdir()
        val, test = (0.2, 0.9) if point["lr"] == "1" else (0.4, 0.1)
        J = {
            "final": test + 0.1 * int(point["seed"]),
            "incremental": 0.6,
            "learning": 0.5,
            "forgetting": None,
            "fwt": 0.1,
        }
        results = {
            "complete": True,
            "val_matrix": {"J": [[0.0], [val]]},
            "matrix": {"J_swap": [[0.1], [0.1]]},
            "metrics": {"J": J, "F": {"final": 0.3}},
        }
        results["seconds"] = {"train": [60, 60], "consolidate": [], "evaluate": [30]}
        (folder / "results.json").write_text(json.dumps(results))
    rows = sweep.table(points, given).splitlines()[2:]
    assert rows[0].startswith(
        "| lr=2 | 2 | 0.400 ± 0.000 | 0.150 ± 0.071 | 0.600 ± 0.000 | 0.500 ± 0.000 | – |"
    ) and rows[1].startswith("| lr=1 | 2 | 0.200")


def test_a_sweep_runs_skips_and_names_what_failed(tree, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "\n".join(word.replace("=", ": ") for word in TINY)
        + f"\nepochs_first: 0\nepochs: 0\ndata_root: {tree}\ncache_dir: {tmp_path / 'cache'}\n"
    )
    words = [
        "sweep.py",
        "--cfg",
        tmp_path / "c.yaml",
        "--out",
        tmp_path / "s",
        "method=finetune,frozen",
        "base=4",
    ]
    first = run(*words)
    assert (
        first.returncode == 0
        and first.stdout.count("done ") == 2
        and "| method=frozen | 1 |" in (tmp_path / "s" / "sweep.md").read_text()
    ), first.stderr
    assert run(*words).stdout.count("done ") == 0
    printed = run(*words, "--print").stdout.splitlines()
    assert len(printed) == 2 and all(
        line.startswith("python train.py --resume --cfg ") for line in printed
    )
    again = run(*shlex.split(printed[1])[1:])
    assert again.returncode == 0 and "is finished" in again.stdout, (
        again.stderr
    )  # the very runs that the sweep made
    failed = run(*words[:-2], "method=frozen", "base=9")
    assert failed.returncode == 1 and "base=9, but the data has 4 classes" in failed.stdout
