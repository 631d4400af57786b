"""The command line of train.py: one run, or a grid of runs. Imports no torch.

A key with several values, `method=lra,ewc seed=0,1,2`, makes a grid: every combination is a run in
a process of its own. Brackets or quotes protect a comma. What is finished is skipped, what was
begun is resumed, so the same command goes on after a stop. Settings are ranked by final J on
validation clips, the mean over seeds (and data roots); test scores stand beside it.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from atlas.config import FIELDS, METHODS, as_dict, load_config, run_name, split_word
from atlas.errors import AtlasError, one_line_errors

SCRIPT = Path(__file__).parents[1] / "train.py"
REPLICATES = ("seed", "data_root")  # what a setting is averaged over
SECTIONS = {"name": "run", "dataset": "data", "protocol": "protocol", "visual": "model"}
SECTIONS |= {"method": "method", "epochs_first": "optim"}  # the first key of each block
COLUMNS = ("val J final", "J final", "J forgetting", "minutes")


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    words: list  # train.py's arguments
    config: object
    setting: str  # its varied keys, seed and data_root aside

    @property
    def folder(self):
        return Path(self.config.out_dir, run_name(self.config))


@dataclass(frozen=True)
class Arguments:
    """What a command line asks for."""

    points: list
    resume: bool
    jobs: int
    print_only: bool

    @property
    def is_grid(self):
        return self.print_only or len(self.points) > 1

    @property
    def config(self):
        return self.points[0].config


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise AtlasError(f"{message}; keys are given as key=value, see --help")


def parse_arguments(manual, words=None):
    """The Arguments of a command line; `manual` is the script's docstring.

    Every run's config is checked. It exits on --help and, with one line, on bad input.
    """
    parser = Parser(
        usage="train.py [--cfg FILE...] [--resume] [--jobs N] [--print] [key=value...]",
        description=manual,
        epilog=f"keys=defaults:\n{key_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cfg", action="store_true", help="YAML files follow; later ones win")
    parser.add_argument("--resume", action="store_true", help="go on with a run, or begin it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs of a grid at a time")
    parser.add_argument(
        "--print", action="store_true", help="print the commands of a grid, run nothing"
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys; they win over files")
    with one_line_errors():
        given = parser.parse_intermixed_args(words)
        files, keys = files_and_keys(given.words)
        if given.jobs < 1:
            raise AtlasError(f"--jobs {given.jobs} must be at least 1")
        points = grid(files, keys)
        if len(points) > 1 and os.environ.get("WORLD_SIZE", "1") != "1":
            raise AtlasError("torchrun takes one run; give one value for each key")
        return Arguments(points, given.resume, given.jobs, given.print)


def files_and_keys(words):
    """(config files, key=value words) of a command line, either in their order."""
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    return files, [word for word in words if word not in files]


def grid(files, words):
    """The Points of config files and `key=value,value` words: every combination, each checked."""
    texts = dict(map(split_word, words))  # of two equal keys the last wins
    values = {key: split_values(text) for key, text in texts.items()}
    varied = [key for key, several in values.items() if len(several) > 1]
    if "name" in varied:
        raise AtlasError("a grid takes one name; it begins the name of each run's folder")
    points = []
    for chosen in itertools.product(*values.values()):
        point = dict(zip(values, chosen))
        config = load_config(files, [f"{key}={text}" for key, text in point.items()])
        if varied:
            point["name"] = folder_name(config, {key: point[key] for key in varied})
        words = [f"{key}={text}" for key, text in point.items()]
        own = [f"{key}={point[key]}" for key in varied if key not in REPLICATES]
        command = ["--resume", *(["--cfg", *map(str, files)] if files else []), *words]
        points.append(Point(command, load_config(files, words), " ".join(own) or "as configured"))
    for a, b in itertools.combinations(points, 2):
        if a.folder == b.folder:
            raise AtlasError(f"two runs of the grid would share the folder {a.folder}")
    return points


def split_values(text):
    """["a", "b"] of "a,b"; a comma in brackets, or in quotes that open a value, does not split."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not values[-1]:
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth < 1:
            values.append("")
            continue
        values[-1] += letter
    return [value.strip() for value in values]


def folder_name(config, varied):
    """The name of a grid's run: the given name, or protocol, method and seed; then what varies."""
    shown = {"protocol": config.protocol, "method": config.method, "seed": f"seed{config.seed}"}
    parts = [text for key, text in shown.items() if key in varied or not config.name]
    parts += [f"{key}-{text}" for key, text in varied.items() if key not in shown]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join([config.name or "", *parts]).strip("_"))


def run_grid(arguments, table, start=None):
    """Run a grid, or print its commands; the exit status, 1 if a run failed.

    table(results of the finished runs) gives the text that ends it. start(words, file, jobs) begins
    train.py, writes its errors to the file and returns its exit status.
    """
    points, failed = arguments.points, []
    if arguments.print_only:
        for point in points:
            print(shlex.join(["python", "train.py", *point.words]))
        return 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [pool.submit(run, point, arguments.jobs, start or start_run) for point in points]
        try:
            failed = [point for point, run in zip(points, runs) if not run.result()]
        except BaseException:  # Ctrl-C: what waits is not begun
            pool.shutdown(cancel_futures=True)
            raise
    done = [(point, results) for point in points if (results := finished(point))]
    if done:
        print(f"\n{ranking(done)}\n\n{table([results for _, results in done])}")
    if failed:
        print(f"error: {len(failed)} of {len(points)} runs failed", file=sys.stderr)
    return 1 if failed else 0


def run(point, jobs, start):
    """Train one point, or go on with it, or skip it where it is finished; whether it is well."""
    if before := finished(point):
        old, new = before["config"], json.loads(json.dumps(as_dict(point.config)))
        if differing := [k for k in new if k != "first_task" and old.get(k) != new[k]]:
            text = f"holds a run of another config ({', '.join(differing)}); choose another name="
            print(f"error: {point.folder} {text}", file=sys.stderr, flush=True)
            return False
        print(f"finished before: {point.folder}", flush=True)
        return True
    errors = point.folder.with_name(point.folder.name + ".err")
    errors.parent.mkdir(parents=True, exist_ok=True)
    if status := start(point.words, errors, jobs):
        lines = errors.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit status {status}")
        print(f"{last} (run {point.folder}, all of it: {errors})", file=sys.stderr, flush=True)
        return False
    errors.unlink()
    print(f"done: {point.folder}", flush=True)
    return True


def start_run(words, errors, jobs):
    """Run train.py in a process of its own, its stderr in the file `errors`; the exit status."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with open(errors, "wb") as file:
        return subprocess.run(
            [sys.executable, str(SCRIPT), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={"OMP_NUM_THREADS": threads} | os.environ,
        ).returncode


def finished(point):
    """The results of a finished run, or None."""
    try:
        results = json.loads((point.folder / "results.json").read_text("utf-8"))
        return results if results["complete"] else None
    except (OSError, ValueError, KeyError, TypeError):  # --resume says what is wrong with it
        return None


def ranking(done):
    """Markdown, a row a setting, the best final J on validation clips first."""
    rows = {}
    for point, results in done:
        last = results["val_matrix"]["J"][-1] or [None]
        J = results["metrics"]["J"]
        minutes = sum(sum(part) for part in results["seconds"].values()) / 60
        scores = (average(last), J["final"], J["forgetting"], minutes)
        rows.setdefault(point.setting, []).append(scores)
    best = sorted(rows.items(), key=lambda row: -(average([run[0] for run in row[1]]) or 0))
    lines = [f"| setting | runs | {' | '.join(COLUMNS)} |", "|---" * 6 + "|"]
    for setting, runs in best:
        lines.append(f"| {setting} | {len(runs)} | {' | '.join(map(spread, zip(*runs)))} |")
    return "\n".join(lines)


def average(values):
    """The mean, or None where a value is missing."""
    return None if None in values else mean(values)


def spread(values):
    """Mean and standard deviation as text."""
    if None in values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def key_help():
    """The keys, their defaults and meaning, under the titles of their blocks, in 80 columns."""
    lines = []
    for name, f in FIELDS.items():
        if name in SECTIONS:
            lines.append(f"\n-- {SECTIONS[name]}")
        default = "null" if f.default is None else str(f.default)
        default = default.lower() if isinstance(f.default, bool) else default
        choices = f.metadata["choices"]
        given = f" [{' | '.join(choices)}]" if choices and name != "method" else ""
        lines += wrapped(f"  {name}={default}", 26, f.metadata["help"] + given)
        if name == "method":
            for method, entry in METHODS.items():
                strength = "" if entry.strength is None else f" (strength {entry.strength:g})"
                lines += wrapped(f"    {method}", 17, entry.help + strength)
    return "\n".join(lines)


def wrapped(head, column, text):
    start = f"{head} ".ljust(column)
    return textwrap.wrap(text, 79, initial_indent=start, subsequent_indent=" " * column)
