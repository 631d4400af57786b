"""Everything that turns files into clips.

    synth --out data/synthetic
    collect --voc VOC2012 --esc ESC-50 --out data/stock
    compose --stock data/stock --out data/open
    extract --videos raw_videos --csv s4_meta_data.csv --out data/AVSBench
    check --root data/AVSBench
    pack --cfg configs/ss_cil.yaml

`python prepare_data.py COMMAND --help` explains each.
"""

import argparse
import sys

from atlas.errors import AtlasError, one_line_errors, prepare_process


def synth(out, dataset="s4", **settings):
    """make a synthetic S4 or MS3 tree"""
    from atlas.prepare.synth import make_set

    make_set(dataset, out, **settings)
    print(f"{out}: done")


def collect(out, lists=(), **folders):
    """fill a stock from public data sets; run it again to add more"""
    from atlas.prepare.collect import fill_stock

    added, left, missing = fill_stock(out, folders, lists)
    for (name, kind), number in sorted(added.items()):
        print(f"{name}: {number} {kind} added")
    for why, number in left.items():
        print(f"left out: {number} {why}")
    for row in missing:
        file = row.get("picture") or row["sound"]
        print(f"missing: {row['class']}/{file} ({row['dataset']}, {row['path']})")
    of_list = f", {len(missing)} of the list missing" if lists else ""
    print(f"{out}: {added.total()} files added{of_list}")


def compose(stock, out, **recipe):
    """make an open S4 or MS3 tree from a stock"""
    from atlas.prepare.compose import Recipe, make_open_set

    report = make_open_set(stock, out, Recipe(**recipe))
    text = "{} {clips} ({picture_sources}, {sound_sources})".format
    print("clips (sources of pictures, of sounds)")
    for name, splits in report["heard"].items():
        print(f"{name}:", *(text(split, **found) for split, found in splits.items()))
    print(f"{out}: {len(report['clips'])} clips; compose.json says what each is made of")


def extract(videos, out, csv=None, dataset="s4"):
    """take frames and sounds out of mp4 files; exit 1 where one is bad"""
    from atlas.prepare.extract import extract as take

    extracted, kept, bad = take(videos, out, csv, dataset)
    for video, why in bad:
        print(f"bad: {video}: {why}")
    print(f"{out}: {extracted} clips extracted, {kept} were there already, {len(bad)} are bad")
    return 1 if bad else 0


def check(root=None, stock=None):
    """read a whole tree or stock and report; exit 1 on errors"""
    from atlas.prepare.check import check as check_tree
    from atlas.prepare.stock import check_stock

    if (root is None) == (stock is None):
        raise AtlasError("check needs --root or --stock, one of them")
    counts, errors, warnings = check_tree(root) if root else check_stock(stock)
    lines = counts + [f"warning: {line}" for line in warnings]
    print(*lines, *(f"error: {line}" for line in errors), sep="\n")
    print(f"{len(errors)} errors, {len(warnings)} warnings")
    return 1 if errors else 0


def pack(words, cfg=()):
    """build the packed cache of a config"""
    from atlas.config import load_config
    from atlas.prepare import make_missing
    from atlas.runs import open_data
    from atlas.sweep import files_and_keys

    config = load_config(*files_and_keys([*cfg, *words]))
    make_missing(config)
    cache, _ = open_data(config)
    size = sum(array.nbytes for array in cache.arrays.values()) / 2**20
    print(f"{cache.folder}: {len(cache.clips)} clips, {size:.0f} MB")


def names(text):
    return tuple(name.strip() for name in text.split(",") if name.strip())


def option(help, type=None, **more):
    return {"help": help, "type": type, **more}


# Each command is called with those of its options that are given.
STOCK = option("a folder as collect makes it")
TREE = option("the folder of Single-source/ or Multi-sources/")
TO = {
    "--out": TREE | {"required": True},
    "--dataset": option("which tree (s4)", choices=("s4", "ms3")),
}
OPTIONS = {
    synth: TO
    | {
        "--seed": option("decides all that is drawn (0)", int),
        "--size": option("pixels of a side (96)", int),
        "--train": option("clips: in S4 of a class (32), in MS3 in all (1200)", int),
        "--val": option("the same for validation (3; 60)", int),
        "--test": option("the same for testing (5; 120)", int),
        "--classes": option("CLASS,CLASS,... (all 23)", names),
    },
    collect: {
        "--voc": option("PASCAL VOC: JPEGImages/, SegmentationClass/", metavar="DIR"),
        "--coco": option("COCO: annotations/instances_SET.json, SET/*.jpg", metavar="DIR"),
        "--davis": option("DAVIS: JPEGImages/480p/, Annotations/480p/", metavar="DIR"),
        "--esc": option("ESC-50: audio/, meta/esc50.csv", metavar="DIR"),
        "--sounds": option("sounds: CLASS/*.wav, ogg, flac or mp3", metavar="DIR"),
        "--out": option("the stock, new or there already", required=True),
        "--list": option("take what these tables name", nargs="+", dest="lists", metavar="CSV"),
    },
    compose: TO
    | {
        "--stock": STOCK | {"required": True},
        "--seed": option("decides all that is drawn (0)", int),
        "--size": option("pixels of a side (128)", int),
        "--clips": option("train clips: in S4 of a class (40), in MS3 in all (1000)", int),
        "--classes": option("CLASS,CLASS,... to be heard (all that have enough)", names),
        "--alone": option("share of the clips that show one picture only (0)", float),
    },
    extract: TO
    | {
        "--videos": option("AVSBench's raw_videos, or the folder of NAME.mp4", required=True),
        "--csv": option("AVSBench's s4_meta_data.csv or ms3_meta_data.csv (that in --out)"),
    },
    check: {"--root": TREE, "--stock": STOCK},
    pack: {
        "--cfg": option("YAML files, overlaid left to right", nargs="+", action="extend"),
        "words": option("keys; they win over files", nargs="*", metavar="key=value"),
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
    given = vars(parser.parse_args())
    return given.pop("run"), {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    prepare_process()
    run, given = parse()
    with one_line_errors():
        sys.exit(run(**given))
