"""Run a grid of settings through train.py and rank it on the validation matrix.

    python sweep.py --cfg configs/ss_cil.yaml configs/tiny.yaml --out runs/power --jobs 2 seed=0,1 lra_power=1,0.5,0 lra_lambda=0.3,1,3

A comma separates the values of a key; every combination is a run in its own folder below OUT. What is finished is skipped, what was begun is resumed, so the same
command goes on after a stop. OUT/sweep.md lists the settings, best first: by final J on validation clips, mean over seeds (and over data_root, where several are given).
Test scores stand beside it, mean ± standard deviation, and decide nothing. In a value, {seed} is the run's seed: first_task=runs/first/method=finetune,seed={seed}
takes over the first task that another sweep learned once for all methods. With --print it runs nothing and prints the commands, one a line, as a Slurm array takes them (README).
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

from atlas.config import Config, as_dict, load_config
from atlas.errors import AtlasError, one_line_errors

REPLICATES = ("seed", "data_root")  # what a row of the table is averaged over
COLUMNS = {
    "val J final": lambda results: mean(results["val_matrix"]["J"][-1]),  # which decides
    **{
        f"J {name}": lambda results, name=name: results["metrics"]["J"][name]
        for name in ("final", "incremental", "learning", "forgetting", "fwt")
    },
    "J swap": lambda results: mean(results["matrix"]["J_swap"][-1]),
    "F final": lambda results: results["metrics"]["F"]["final"],
    "minutes": lambda results: sum(map(sum, results["seconds"].values())) / 60,
}


def grid(words):
    """["a=1,2", "b=3"] -> [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]"""
    if wrong := [word for word in words if "=" not in word]:
        raise AtlasError(f"`{wrong[0]}` is not key=value,value")
    given = dict(word.split("=", 1) for word in words)
    values = [
        [value] if key in ("first_task", "joint_run") else value.split(",")
        for key, value in given.items()
    ]  # the name of a sweep's folder has commas
    return [dict(zip(given, chosen)) for chosen in itertools.product(*values)]


def words_of(point, given):
    """What follows --cfg's files on train.py's command line, {seed} filled in. The folder's name says the settings."""
    return [
        *(f"{k}={v.replace('{seed}', point.get('seed', '{seed}'))}" for k, v in point.items()),
        f"out_dir={given.out}",
        f"name={folder_of(point, given).name}",
    ]


def launch(point, given):
    """Train one point, or go on with it, or skip it where it is finished; its error line, or None."""
    folder, words = folder_of(point, given), words_of(point, given)
    if before := finished(folder):
        same = as_dict(Config()) | before["config"] | {"first_task": None} == as_dict(
            load_config(given.cfg, words)
        ) | {"first_task": None}
        error = (
            None if same else f"{folder} holds a run of other config files; choose another --out"
        )
    else:
        threads = str(max(1, (os.cpu_count() or 1) // given.jobs))
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "train.py"),
            "--resume",
            "--cfg",
            *given.cfg,
            *words,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={"OMP_NUM_THREADS": threads} | os.environ
        )
        error = (
            f"{folder.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            if done.returncode
            else None
        )
    if error or not before:
        print(error or f"done {folder.name}", flush=True)
    return error


def folder_of(point, given):
    return Path(
        given.out,
        ",".join(
            f"{k}={v.rstrip('/').rpartition('/')[2]}" for k, v in point.items() if k != "first_task"
        )
        or "as_configured",
    )


def finished(folder):
    """The results of a finished run, or None."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {"complete": False}
    return results if results["complete"] else None


def table(points, given):
    """Markdown, a row a setting, best validation J first."""
    from atlas.report.table import UNDEFINED, spread_text  # torch comes with it

    rows, varied = (
        {},
        [k for k in points[0] if len({point[k] for point in points}) > 1 and k not in REPLICATES],
    )
    for point in points:
        if results := finished(folder_of(point, given)):
            rows.setdefault(
                " ".join(f"{k}={point[k]}" for k in varied) or "as configured", []
            ).append([score(results) for score in COLUMNS.values()])
    lines = [f"| setting | runs | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for setting, runs in sorted(
        rows.items(), key=lambda item: -mean(scores[0] for scores in item[1])
    ):
        lines.append(
            f"| {setting} | {len(runs)} | {' | '.join(UNDEFINED if None in v else spread_text(v) for v in zip(*runs))} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cfg", nargs="+", required=True, metavar="FILE", help="YAML files, overlaid left to right"
    )
    parser.add_argument("--out", required=True, help="folder of the runs and of sweep.md")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--print", action="store_true", help="print the commands instead of running them"
    )
    parser.add_argument("grid", nargs="*", metavar="key=v1,v2", help="values to combine")
    given = parser.parse_args()
    points = grid(given.grid + [w for w in given.cfg if "=" in w])
    given.cfg = [w for w in given.cfg if "=" not in w]
    if given.print:
        print(
            *(
                shlex.join(
                    ["python", "train.py", "--resume", "--cfg", *given.cfg, *words_of(point, given)]
                )
                for point in points
            ),
            sep="\n",
        )
        return 0
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        errors = [error for error in pool.map(lambda point: launch(point, given), points) if error]
    text = table(points, given)
    Path(given.out).mkdir(parents=True, exist_ok=True)
    Path(given.out, "sweep.md").write_text(f"`{' '.join(map(str, sys.argv))}`\n\n{text}\n")
    print(text)
    return 1 if errors else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
