"""Everything that turns files into clips.

    synth --out data/synthetic                                      a synthetic S4 or MS3 set
    collect --voc VOC2012 --esc ESC-50 --out data/stock             a stock of pictures and sounds
    compose --stock data/stock --out data/open                      an open S4 or MS3 set from it
    extract --videos raw_videos --csv s4_meta_data.csv --out data/AVSBench     AVSBench from mp4
    check --root data/AVSBench                                      what is missing or wrong
    pack --cfg configs/ss_cil.yaml                                  the packed cache of a config

`python prepare_data.py COMMAND --help` explains each.
"""

import argparse
import os
import sys

from atlas.errors import AtlasError, one_line_errors, prepare_process


def synth(given):
    """make a synthetic S4 or MS3 tree"""
    from atlas.prepare import make_set

    keys = ("seed", "size", "train", "val", "test", "classes")
    make_set(given.dataset, given.out, **chosen(given, *keys))
    print(f"{given.out}: done")


def collect(given):
    """fill a stock from public data sets; run it again to add more"""
    from atlas.prepare.collect import READERS, fill_stock

    folders = chosen(given, *READERS)
    added, left, missing = fill_stock(given.out, folders, given.map, given.most, given.list)
    for name in sorted({name for name, _ in added}):
        print(f"{name}: {added[name, 'pictures']} pictures, {added[name, 'sounds']} sounds added")
    for why, number in left.items():
        print(f"left out: {number} {why}")
    for row in missing:
        file = row.get("picture") or row["sound"]
        print(f"missing: {row['class']}/{file} ({row['dataset']}, {row['path']})")
    of_list = f", {len(missing)} of the list missing" if given.list else ""
    print(f"{given.out}: {added.total()} files added{of_list}")


def compose(given):
    """make an open S4 or MS3 tree from a stock"""
    from atlas.prepare.compose import Recipe, make_open_set

    recipe = Recipe(**chosen(given, "dataset", "seed", "size", "clips", "classes", "alone"))
    report = make_open_set(given.stock, given.out, recipe)
    print("clips (sources of pictures, of sounds)")
    for name, splits in report["heard"].items():
        text = "{clips} ({picture_sources}, {sound_sources})"
        print(f"{name}:", *(f"{split} " + text.format(**splits[split]) for split in splits))
    print(f"{given.out}: {len(report['clips'])} clips; compose.json says what each is made of")


def extract(given):
    """take frames and sounds out of mp4 files; exit 1 where one is bad"""
    from atlas.prepare.extract import extract as take

    keys = ("videos", "out", "csv", "dataset", "size", "jobs", "whole")
    done = take(*(getattr(given, key) for key in keys))
    for video, reason in done["bad"][:20]:
        print(f"bad: {video}: {reason}")
    if done["bad"]:
        print(f"{len(done['bad'])} videos are bad; {done['list']} names them all")
    print(f"{given.out}: {done['extracted']} clips extracted, {done['kept']} were there already")
    return 1 if done["bad"] else 0


def check(given):
    """read a whole tree or stock and report; exit 1 on errors"""
    from atlas.prepare.check import check as check_tree
    from atlas.prepare.stock import check_stock

    if (given.root is None) == (given.stock is None):
        raise AtlasError("check needs --root or --stock, one of them")
    found = check_tree(given.root) if given.root else check_stock(given.stock)
    counts, errors, warnings = found
    lines = counts + [f"warning: {line}" for line in warnings]
    print(*lines, *(f"error: {line}" for line in errors), sep="\n")
    print(f"{len(errors)} errors, {len(warnings)} warnings")
    return 1 if errors else 0


def pack(given):
    """build the packed cache of a config"""
    from atlas.config import load_config
    from atlas.prepare import make_missing
    from atlas.runs import open_data
    from atlas.sweep import files_and_keys

    config = load_config(*files_and_keys(given.cfg + given.words))
    make_missing(config)
    cache, _ = open_data(config)
    size = sum(array.nbytes for array in cache.arrays.values()) / 2**20
    print(f"{cache.folder}: {len(cache.clips)} clips, {size:.0f} MB")


def chosen(given, *keys):
    """{key: value} of the options that were given or have a default."""
    return {key: getattr(given, key) for key in keys if getattr(given, key) is not None}


def names(text):
    return tuple(name.strip() for name in text.split(",") if name.strip())


def option(help, default=None, **more):
    """What argparse needs to know. The type is that of the default, if there is one."""
    if default is not None and "nargs" not in more:
        more["type"] = type(default)
    return {"help": help, "default": default, **more}


TREE = "the folder that holds Single-source/ or Multi-sources/"
OUT = option(TREE, required=True)
DATASET = option("which tree (s4)", "s4", choices=("s4", "ms3"))
SEED = option("decides all that is drawn (0)", 0)
STOCK = "a folder as collect makes it"
OPTIONS = {
    synth: {
        "--out": OUT,
        "--dataset": DATASET,
        "--seed": SEED,
        "--size": option("pixels of a side (96)", 96),
        "--train": option("clips: in S4 of a class (32), in MS3 in all (1200)", type=int),
        "--val": option("the same for validation (3; 60)", type=int),
        "--test": option("the same for testing (5; 120)", type=int),
        "--classes": option("CLASS,CLASS,... (all 23)", type=names),
    },
    collect: {
        "--voc": option("PASCAL VOC: JPEGImages/, SegmentationClass/", metavar="DIR"),
        "--coco": option("COCO: annotations/instances_SET.json, SET/*.jpg", metavar="DIR"),
        "--davis": option("DAVIS: JPEGImages/480p/, Annotations/480p/", metavar="DIR"),
        "--esc": option("ESC-50: audio/, meta/esc50.csv", metavar="DIR"),
        "--sounds": option("sounds: CLASS/*.wav, ogg, flac or mp3", metavar="DIR"),
        "--out": option("the stock, new or there already", required=True),
        "--map": option("which class is what in each set (configs/class_map.yaml)"),
        "--most": option("pictures, or sounds, of a class from each folder (200)", 200),
        "--list": option("take what these tables name, as those of a stock", (), nargs="+"),
    },
    compose: {
        "--stock": option(STOCK, required=True),
        "--out": OUT,
        "--dataset": DATASET,
        "--seed": SEED,
        "--size": option("pixels of a side (128)", 128),
        "--clips": option("train clips: in S4 of a class (40), in MS3 in all (1000)", type=int),
        "--classes": option("CLASS,CLASS,... to be heard (all that have enough)", type=names),
        "--alone": option("share of the clips that show one picture only (0)", 0.0),
    },
    extract: {
        "--videos": option("AVSBench's raw_videos, or the folder of NAME.mp4", required=True),
        "--csv": option("AVSBench's s4_meta_data.csv or ms3_meta_data.csv (that in --out)"),
        "--out": OUT,
        "--dataset": DATASET,
        "--size": option("pixels of a side, the masks' (224)", 224),
        "--jobs": option("processes (all cores)", os.cpu_count()),
        "--whole": {"action": "store_true", "help": "untrimmed videos: cut at the CSV's start"},
    },
    check: {"--root": option(TREE), "--stock": option(STOCK)},
    pack: {
        "--cfg": option("YAML files, overlaid left to right", [], nargs="+", action="extend"),
        "words": option("keys; they win over files", [], nargs="*", metavar="key=value"),
    },
}


def parse():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, options in OPTIONS.items():
        text = function.__doc__
        command = commands.add_parser(function.__name__, help=text, description=text)
        command.set_defaults(run=function)
        for name, settings in options.items():
            command.add_argument(name, **settings)
    return parser.parse_args()


if __name__ == "__main__":
    prepare_process()
    given = parse()
    with one_line_errors():
        sys.exit(given.run(given))
