"""The command line of train.py: one run, or a grid of runs. Imports no torch.

A key with several values, `method=lra,ewc seed=0,1,2`, makes a grid: every combination is a run in
a process of its own. What is finished is skipped, what was begun is resumed.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from atlas.config import FIELDS, METHODS, as_dict, load_config, run_name, split_word
from atlas.errors import AtlasError, one_line_errors
from atlas.results import mean_known, read_results

REPLICATES = ("seed", "data_root")  # what a setting is averaged over
SECTIONS = {"name": "run", "dataset": "data", "protocol": "protocol", "visual": "model"}
SECTIONS |= {"method": "method", "epochs_first": "optim"}  # the first key of each block
VALUE = r"""(\[[^]]*\]|\([^)]*\)|\{[^}]*\}|'[^']*'|"[^"]*"|[^,])+"""  # brackets, quotes keep commas

# A run: train.py's arguments, its config, its varied keys (REPLICATES aside) and its folder.
Point = namedtuple("Point", "words config setting folder")


def parse_arguments(manual, words=None):
    """A command line: points, is_grid, config (of a single run), resume, jobs and print_only."""
    parser = argparse.ArgumentParser(
        usage="train.py [--cfg FILE...] [--resume] [--jobs N] [--print] [key=value...]",
        description=manual,
        epilog=f"keys=defaults:\n{key_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = {"action": "store_true"}
    parser.add_argument("--cfg", **flag, help="YAML files follow; later ones win")
    parser.add_argument("--resume", **flag, help="go on with a run, or begin it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs of a grid at a time")
    parser.add_argument("--print", **flag, dest="print_only", help="print a grid's commands")
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys; they win over files")
    with one_line_errors():
        given = parser.parse_intermixed_args(words)
        given.points = grid(*files_and_keys(given.words))
        given.config = given.points[0].config
        given.is_grid = given.print_only or len(given.points) > 1
        if given.jobs < 1:
            raise AtlasError(f"--jobs {given.jobs} must be at least 1")
        if given.is_grid and os.environ.get("WORLD_SIZE", "1") != "1":
            raise AtlasError("torchrun takes one run; give one value for each key")
        return given


def files_and_keys(words):
    """(config files, key=value words) of a command line, either in their order."""
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    return files, [word for word in words if word not in files]


def grid(files, words):
    """The Points of config files and `key=value,value` words: every combination, each checked."""
    values = {key: split_values(text) for key, text in map(split_word, words)}  # the last wins
    points = []
    for chosen in itertools.product(*values.values()):
        named = dict(zip(values, chosen))
        keys = [f"{key}={text}" for key, text in named.items()]
        config = load_config(files, keys)
        varied = {key: text for key, text in named.items() if len(values[key]) > 1}
        if varied:
            keys.append(f"name={folder_name(config, varied)}")
            config = load_config(files, keys)
        command = ["--resume", *(["--cfg", *map(str, files)] if files else []), *keys]
        own = " ".join(f"{key}={text}" for key, text in varied.items() if key not in REPLICATES)
        folder = Path(config.out_dir, run_name(config))
        points.append(Point(command, config, own or "as configured", folder))
    folder, runs = Counter(point.folder for point in points).most_common(1)[0]
    if runs > 1:
        raise AtlasError(f"{runs} runs would share {folder}; give other values")
    return points


def split_values(text):
    """["a", "b"] of "a,b"; a comma in brackets or quotes does not split."""
    return [value[0].strip() for value in re.finditer(VALUE, text)] or [""]


def folder_name(config, varied):
    """A run's name: the given one, or protocol, method and seed; then what varies."""
    shown = {"protocol": config.protocol, "method": config.method, "seed": f"seed{config.seed}"}
    parts = [text for key, text in shown.items() if key in varied or not config.name]
    parts += [f"{key}-{text}" for key, text in varied.items() if key not in shown]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join([config.name or "", *parts]).strip("_"))


def start_run(words, errors, jobs):
    """Run train.py as a process, its stderr in the file `errors`. Returns the exit status."""
    command = [sys.executable, Path(__file__).parents[1] / "train.py", *words]
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
    with open(errors, "wb") as err:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=err, env=env)


def run_grid(arguments, table, start=start_run):
    """Run a grid, or print it; `table` makes a text of all results. Returns the exit status."""
    points, jobs = arguments.points, arguments.jobs
    if arguments.print_only:
        print("\n".join(shlex.join(["python", "train.py", *point.words]) for point in points))
        return 0
    with ThreadPoolExecutor(jobs) as pool:  # after Ctrl-C, what waits is not begun
        found = list(pool.map(lambda point: run(point, jobs, start), points))
    done = [(point, results) for point, results in zip(points, found) if results]
    if done:
        print(f"\n{ranking(done)}\n\n{table([results for _, results in done])}")
    if failed := len(points) - len(done):
        print(f"error: {failed} of {len(points)} runs failed", file=sys.stderr)
    return 1 if failed else 0


def run(point, jobs, start):
    """Train one point, or go on with it, unless it is finished. Its results; None if it failed."""
    if results := finished(point):
        print(f"finished before: {point.folder}")
        return results
    errors = point.folder.with_name(f"{point.folder.name}.err")
    errors.parent.mkdir(parents=True, exist_ok=True)
    if status := start(point.words, errors, jobs):
        last = errors.read_text(errors="replace").rstrip().rpartition("\n")[2]
        print(last or f"error: exit status {status}", f"(all of it: {errors})", file=sys.stderr)
        return None
    errors.unlink()
    print(f"done: {point.folder}")
    return finished(point)


def finished(point):
    """The results of a finished run of this config, else None."""
    try:
        results = read_results(point.folder)
    except AtlasError:
        return None
    asked = as_dict(point.config) | {"first_task": results["config"].get("first_task")}
    return results if results["complete"] and results["config"] == asked else None


def ranking(done):
    """Markdown, a row a setting, the best final J on validation clips first."""
    rows = {}
    for point, results in done:
        val = mean_known(results["val_matrix"]["J"][-1])
        rows.setdefault(point.setting, []).append((val, results["metrics"]["J"]["final"]))
    lines = ["| setting | runs | val J final | J final |", "|---|---|---|---|"]
    for setting in sorted(rows, key=lambda s: -(mean_known([run[0] for run in rows[s]]) or 0)):
        cells = [setting, str(len(rows[setting])), *map(spread, zip(*rows[setting]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values):
    """Mean ± standard deviation."""
    if None in values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def key_help():
    """The keys, their defaults and meaning, under their titles, in 80 columns."""
    lines = []
    for name, f in FIELDS.items():
        if name in SECTIONS:
            lines += ["", f"-- {SECTIONS[name]}"]
        choices = " | ".join(f.metadata["choices"])
        given = f" [{choices}]" if choices and name != "method" else ""
        default = json.dumps(f.default).strip('"')
        lines.append(f"{f'  {name}={default}':<25} {f.metadata['help']}{given}")
        if name == "method":
            for method, entry in METHODS.items():
                strength = "" if entry.strength is None else f" (strength {entry.strength:g})"
                lines.append(f"    {method:<21} {entry.help}{strength}")
    return "\n".join(textwrap.fill(line, 79, subsequent_indent=" " * 26) for line in lines)
