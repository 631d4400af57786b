"""The command line of train.py: one run, or a grid of runs, each in a process of its own."""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atlas.config import FIELDS, METHODS, as_dict, load_config, run_name, split_word
from atlas.errors import AtlasError, one_line_errors
from atlas.results import mean_known, read_or_none

REPLICATES = ("seed", "data_root")  # what a setting is averaged over
TITLES = {"name": "run", "dataset": "data", "protocol": "protocol", "visual": "model"}
TITLES |= {"method": "method", "epochs_first": "optim"}  # before the first key of each block
VALUE = r"""(\[[^]]*\]|\([^)]*\)|\{[^}]*\}|'[^']*'|"[^"]*"|[^,])+"""  # brackets, quotes keep commas

# A run: train.py's arguments, its config, its varied keys (REPLICATES aside) and its folder.
Point = namedtuple("Point", "words config setting folder")


def parse_arguments(manual, words=None):
    form = argparse.RawDescriptionHelpFormatter
    usage = "train.py [--cfg FILE...] [--resume] [--jobs N] [--print] [key=value...]"
    keys = f"keys=defaults:\n{key_help()}"
    parser = argparse.ArgumentParser(None, usage, manual, keys, formatter_class=form)
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--cfg", **flag, help="YAML files follow; later ones win")
    add("--resume", **flag, help="go on with a run, or begin it")
    add("--jobs", type=int, default=1, metavar="N", help="runs of a grid at a time")
    add("--print", **flag, help="print a grid's commands")
    add("words", nargs="*", metavar="key=value", help="keys; they win over files")
    with one_line_errors():
        given = parser.parse_intermixed_args(words)
        given.points = grid(*files_and_keys(given.words))
        given.config = given.points[0].config
        given.is_grid = given.print or len(given.points) > 1
        if given.jobs < 1:
            raise AtlasError(f"--jobs {given.jobs} must be at least 1")
        if given.is_grid and os.environ.get("WORLD_SIZE", "1") != "1":
            raise AtlasError("torchrun takes one run; give one value for each key")
        return given


def files_and_keys(words):
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    return files, [word for word in words if word not in files]


def grid(files, words):
    values = {key: split_values(text) for key, text in map(split_word, words)}  # the last wins
    first = ["--resume", *(["--cfg", *map(str, files)] if files else [])]
    points = []
    for chosen in itertools.product(*values.values()):
        keys = [f"{key}={text}" for key, text in zip(values, chosen)]
        varied = {key: text for key, text in zip(values, chosen) if len(values[key]) > 1}
        if varied:
            keys.append(f"name={folder_name(load_config(files, keys), varied)}")
        config = load_config(files, keys)
        setting = [f"{key}={text}" for key, text in varied.items() if key not in REPLICATES]
        folder = Path(config.out_dir, run_name(config))
        points.append(Point([*first, *keys], config, " ".join(setting), folder))
    folder, runs = Counter(point.folder for point in points).most_common(1)[0]
    if runs > 1:
        raise AtlasError(f"{runs} runs would share {folder}; give other values")
    return points


def split_values(text):
    return [value[0].strip() for value in re.finditer(VALUE, text)] or [""]


def folder_name(config, varied):
    """The given name, or protocol, method and seed; then what varies."""
    shown = {"protocol": config.protocol, "method": config.method, "seed": f"seed{config.seed}"}
    parts = [config.name] if config.name else []
    parts += [text for key, text in shown.items() if key in varied or not config.name]
    parts += [f"{key}-{text}" for key, text in varied.items() if key not in shown]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))


def start_run(words, errors, jobs):
    """The exit status of train.py, whose stderr goes to the file `errors`."""
    command = [sys.executable, Path(__file__).parents[1] / "train.py", *words]
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
    with open(errors, "wb") as err:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=err, env=env)


def run_grid(given, table, start=start_run):
    """Run a grid, or print it, and end with table([results]), the best setting's first. Returns
    the exit status."""
    points = given.points
    if given.print:
        print("\n".join(shlex.join(["python", "train.py", *point.words]) for point in points))
        return 0
    with ThreadPoolExecutor(given.jobs) as pool:  # after Ctrl-C, what waits is not begun
        found = list(pool.map(lambda point: run(point, given.jobs, start), points))
    done = [(point.setting, results) for point, results in zip(points, found) if results]
    scores = defaultdict(list)  # of each setting, on validation clips
    for setting, results in done:
        scores[setting].append(mean_known(results["val_matrix"]["J"][-1]))
    best = sorted(done, key=lambda pair: -(mean_known(scores[pair[0]]) or 0))
    if done:
        print(f"\n{table([results for _, results in best])}")
    if failed := len(points) - len(done):
        print(f"error: {failed} of {len(points)} runs failed", file=sys.stderr)
    return 1 if failed else 0


def run(point, jobs, start):
    """The results of a point, trained unless it is finished; None if it failed."""
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
    results = read_or_none(point.folder)
    if not results or not results["complete"]:
        return None
    asked = as_dict(point.config) | {"first_task": results["config"].get("first_task")}
    return results if results["config"] == asked else None


def key_help():
    """The keys with their defaults, in 80 columns."""
    lines = []
    for name, f in FIELDS.items():
        if name in TITLES:
            lines += ["", f"-- {TITLES[name]}"]
        default = json.dumps(f.default).strip('"')
        lines.append(f"{f'  {name}={default}':<25} {f.metadata['help']}")
        if f.metadata["choices"] and name != "method":
            lines[-1] += f" [{' | '.join(f.metadata['choices'])}]"
        for method, entry in METHODS.items() if name == "method" else ():
            strength = "" if entry.strength is None else f" (strength {entry.strength:g})"
            lines.append(f"    {method:<21} {entry.help}{strength}")
    return "\n".join(textwrap.fill(line, 79, subsequent_indent=" " * 26) for line in lines)
