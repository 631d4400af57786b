"""Breaks one thing at a time in what a user's files can hold, and runs the command line on it.

    python tests/fuzz.py --count 500 --seed 0     prints each failure with its number, and counts

A case is a kind of damage (KINDS) to one file of a target (TARGETS): a small tree, its cache, a
finished run, one that was killed in its last task, a config, a weights file, a video. The command
may refuse it in one line, or bear it. It fails where it ends in a traceback, hangs, or exits 0
without a warning and with other results than those of the whole input. One change cannot be
noticed: a config that was cut to another valid one is another request. Its run must then be of just
what it says, each key to the letter, or it counts as silent too.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import timm
import yaml
from conftest import LIGHT, TINY, run
from safetensors.torch import save_file
from test_video import make, tone

from atlas.prepare.synth import CLASSES, make_set
from atlas.runs import Run

HANGS = 120  # seconds
WORDS = dict(word.split("=") for word in TINY[2:])
WORDS |= {"epochs": "2", "epochs_first": "1", "batch_size": "4", "method": "lra"}
UNEQUAL = "pack refuses what check passes"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
HUGE = {".csv": b'"' + b"x" * 300_000, ".yaml": b"seed: " + b"9" * 5000, ".json": b"[" * 100_000}


def whole(place):
    """Make one of each target."""
    few = {"size": 32, "train": 2, "val": 1, "test": 1, "classes": CLASSES[:3]}
    make_set("s4", place / "tree", **few)
    model = timm.create_model(LIGHT, pretrained=False)
    save_file(model.state_dict(), place / "weights.safetensors")
    lines = [f"{key}: {text}\n" for key, text in WORDS.items()]
    (place / "config.yaml").write_text("".join(lines))
    make(place / "video.mp4", sounds=[tone(3)])
    done = train(place)
    assert done.returncode == 0, done.stderr
    killed = train(place, "half", preexec_fn=die_in_last_task)
    assert killed.returncode == -signal.SIGKILL and (place / "half/progress.pt").is_file()
    return place


def train(place, name="run", **options):
    """train.py on the tree, config and weights of `place`, into place/NAME."""
    where = [f"data_root={place}/tree", f"cache_dir={place}/cache", f"out_dir={place}"]
    where += [f"visual={LIGHT}", f"visual_weights={place}/weights.safetensors", f"name={name}"]
    words = ["train.py", "--resume", "--cfg", place / "config.yaml", *where]
    return run(*words, **options) if options else patient(*words)


def die_in_last_task(save=Run.save_progress):
    """In the process of a run: a kill after the first epoch of its last task."""

    def save_and_die(run, plan, epoch):
        save(run, plan, epoch)
        if (plan.t, epoch) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    Run.save_progress = save_and_die


def truncate(path, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(1, max(2, path.stat().st_size))])


def empty(path, draw):
    path.write_bytes(b"")


def flip(path, draw):
    """One bit of the first 64 bytes."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(min(64, len(content)))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def swap(path, draw):
    """Another file of the same folder or the one above, of another type, in its place."""
    others = [p for p in sorted(path.parent.rglob("*")) if p.is_file() and p.suffix != path.suffix]
    path.write_bytes(draw.choice(others).read_bytes() if others else b"\x89PNG\r\n\x1a\n")


def web_page(path, draw):
    path.write_bytes(b"<!DOCTYPE html><html><body>Sign in to download</body></html>")


def pointer(path, draw):
    path.write_bytes(POINTER)


def missing(path, draw):
    path.unlink()


def folder(path, draw):
    """A folder where a file should be."""
    path.unlink()
    path.mkdir()


def doubled(path, draw):
    """Its content twice; of text, one line twice."""
    content = path.read_bytes()
    if path.suffix in (".csv", ".yaml", ".jsonl"):
        lines = content.splitlines(keepends=True)
        lines.insert(1, draw.choice(lines))
        content = b"".join(lines)
    else:
        content += content
    path.write_bytes(content)


def garbage(path, draw):
    path.write_bytes(draw.randbytes(draw.randrange(1, 3000)))


def huge(path, draw):
    path.write_bytes(HUGE.get(path.suffix, path.read_bytes() + bytes(3_000_000)))


def loop(path, draw):
    """A link to itself."""
    path.unlink()
    path.symlink_to(path.name)


KINDS = (truncate, empty, flip, swap, web_page, pointer, missing, folder, doubled, garbage, huge,
    loop)  # fmt: skip


class Hangs(Exception):
    pass


def patient(*words):
    """conftest.run, but a command that takes longer than HANGS is killed and reported."""

    end = time.time() + HANGS
    done = run(*words, stop=lambda: signal.SIGKILL if time.time() > end else None)
    if done.returncode == -signal.SIGKILL:
        raise Hangs
    return done


def scores(folder):
    """What a run says: its matrices."""
    results = json.loads((folder / "results.json").read_text())
    return json.dumps([results["matrix"], results["val_matrix"], results["complete"]])


def cached(place):
    """What a cache holds: a hash of its arrays."""
    digest = hashlib.sha256()
    for path in sorted((place / "cache").glob("s4-*/*.npy")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def of_tree(place):
    """check names what pack refuses; a tree that both bear without a word is packed alike."""
    shutil.rmtree(place / "cache")
    where = [place / "config.yaml", f"data_root={place}/tree", f"cache_dir={place}/cache"]
    found = patient("prepare_data.py", "check", "--root", place / "tree")
    packed = patient("prepare_data.py", "pack", "--cfg", *where)
    warned = "warning" in found.stdout or found.returncode
    if packed.returncode and not warned:
        return [found, packed], UNEQUAL
    return [found, packed], None if packed.returncode or warned else cached(place)


def of_run(place):
    """eval.py reads it and scores it again, and train.py has nothing to do."""
    told = patient("eval.py", place / "run", "--rescore", "--figures")
    gone_on = train(place)
    return [told, gone_on], scores(place / "run") if gone_on.returncode == 0 else None


def of_half(place):
    """train.py goes on from it, to the result that it would have had."""
    gone_on = train(place, "half")
    return [gone_on], scores(place / "half") if gone_on.returncode == 0 else None


def of_training(place):
    """A fresh run with what is broken."""
    shutil.rmtree(place / "run")
    done = train(place)
    return [done], scores(place / "run") if done.returncode == 0 else None


def of_config(place):
    """A fresh run; no answer where it was given other keys than the whole, and has those."""
    done, answer = of_training(place)
    if answer is not None:
        kept = [place / "config.yaml", place / "run/config.yaml"]
        asked, ran = (yaml.load(path.read_bytes(), yaml.BaseLoader) or {} for path in kept)
        changed = asked != WORDS
        answer = None if changed and asked.items() <= ran.items() else answer
    return done, answer


def of_cache(place):
    return [patient("eval.py", place / "run", "--rescore")], None


def of_video(place):
    words = ["--video", place / "video.mp4", "--out", place / "overlay.mp4"]
    return [patient("eval.py", place / "run", *words)], None


TARGETS = {  # name: (files that may be broken, what runs on them)
    "tree": ("tree/**/*.*", of_tree),
    "cache": ("cache/s4-*/*", of_cache),
    "run": ("run/**/*", of_run),
    "half": ("half/**/*", of_half),
    "config": ("config.yaml", of_config),
    "weights": ("weights.safetensors", of_training),
    "video": ("video.mp4", of_video),
}


ANSWERS = {}  # {command: what it gives on the whole input}


def case(source, place, draw):
    """Break one file of a copy of `source` and run; (what was done, why it failed or None)."""
    fresh(source, place)
    target = draw.choice(list(TARGETS))
    pattern, command = TARGETS[target]
    paths = sorted(p for p in place.glob(pattern) if p.is_file() and p.stat().st_size)
    suffix = draw.choice(sorted({p.suffix for p in paths}))  # a tree has one table among pictures
    path = draw.choice([p for p in paths if p.suffix == suffix])
    kind = draw.choice(KINDS)
    if command not in ANSWERS:
        ANSWERS[command] = command(place)[1]
        fresh(source, place)
    kind(path, draw)
    what = f"{target}: {kind.__name__} {path.relative_to(place)}"
    try:
        done, answer = command(place)
    except Hangs:
        return what, "hangs"
    for each in done:
        if "Traceback" in each.stderr + each.stdout or each.returncode < 0:
            return what, "traceback: " + (each.stderr.strip().splitlines() or ["?"])[-1]
    if answer == UNEQUAL:
        return what, answer
    if answer is not None and answer != ANSWERS[command]:
        return what, "silent: other results, and no word of it"
    return what, None


def fresh(source, place):
    """A copy of `source`, in which the runs' own files name the folder that they are in."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place, symlinks=True)
    for path in (*place.glob("*/config.yaml"), *place.glob("*/results.json")):
        path.write_text(path.read_text().replace(str(source), str(place)))


def fuzz(count, seed, told=print):
    """[(number, what, why)] of the cases that fail; told: called with a line a failure."""
    failures, kinds = [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        source = whole(Path(folder, "whole"))
        ANSWERS.update(
            dict.fromkeys((of_run, of_half, of_training, of_config), scores(source / "run"))
        )
        ANSWERS.update(dict.fromkeys((of_cache, of_video)))  # they have none
        for number in range(count):
            what, why = case(source, Path(folder, "broken"), random.Random(f"{seed}-{number}"))
            kinds[what.split()[1]] += 1
            if why:
                failures.append((number, what, why))
                told(f"case {seed}-{number}: {what}: {why}")
    told(f"{count} cases of {len(kinds)} kinds, {len(failures)} failures: {dict(kinds)}")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", default="0")
    sys.exit(bool(fuzz(**vars(parser.parse_args()))))
