"""Everything that turns files into clips.

    python prepare_data.py synth --out data/synthetic                 the synthetic S4 set (23 classes, real PNG and WAV files); MS3 with --dataset ms3
    python prepare_data.py compose --voc VOC2012 --esc ESC-50 --out data/open --seed 0
                                                                      an open S4 set: photos or videos with masks x sounds;
                                                                      with --dataset ms3 several of them, each heard at its own times
    python prepare_data.py extract --videos raw_videos --csv s4_meta_data.csv --out data/AVSBench
                                                                      mp4 files -> the frames and sounds of AVSBench's tree
    python prepare_data.py check --root data/AVSBench                 missing or unreadable files, masks, sounds, split leaks
    python prepare_data.py pack --cfg configs/ss_cil.yaml             the packed cache of a config (train.py makes it too)

`python prepare_data.py COMMAND --help` explains each.
"""

import argparse
import os
import sys

from atlas.config import load_config
from atlas.errors import one_line_errors


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    synth = commands.add_parser(
        "synth",
        help="make a synthetic S4 or MS3 tree",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    synth.add_argument(
        "--dataset",
        choices=("s4", "ms3"),
        default="s4",
        help="s4: one thing is heard; ms3: up to two, that come and go",
    )
    synth.add_argument(
        "--out",
        required=True,
        help="the folder that holds Single-source/ or Multi-sources/ afterwards",
    )
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--size", type=int, default=96, help="height and width in pixels")
    for split, a_class, in_all in (("train", 32, 1200), ("val", 3, 60), ("test", 5, 120)):
        synth.add_argument(
            f"--{split}",
            type=int,
            default=argparse.SUPPRESS,
            help=f"{split} clips; s4: of a class, {a_class}; ms3: in all, {in_all}",
        )
    synth.add_argument("--classes", help="comma-separated S4 categories (default: all 23)")

    compose = commands.add_parser(
        "compose",
        help="make an open S4 or MS3 tree",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compose.add_argument(
        "--dataset",
        choices=("s4", "ms3"),
        default="s4",
        help="s4: one sound, one class; ms3: up to two, that come and go",
    )
    compose.add_argument("--voc", help="VOC folder: JPEGImages/, SegmentationClass/")
    compose.add_argument(
        "--davis",
        help="DAVIS folder: JPEGImages/480p/, Annotations/480p/, classes.csv where there is one",
    )
    compose.add_argument("--esc", required=True, help="ESC-50 folder: audio/, meta/esc50.csv")
    compose.add_argument(
        "--out",
        required=True,
        help="the new folder; holds Single-source/ or Multi-sources/ afterwards",
    )
    compose.add_argument("--seed", type=int, default=0, help="splits, pairs and crops")
    clips = "train clips; s4: of a class, 24, and a quarter and a half of it for val and test; ms3: in all, 400, a sixth and a quarter"
    compose.add_argument("--clips", type=int, default=argparse.SUPPRESS, help=clips)
    compose.add_argument("--size", type=int, default=128, help="height and width in pixels")
    compose.add_argument(
        "--classes",
        help="comma-separated classes (default: all that have three sources of pictures and of sounds)",
    )
    compose.add_argument("--map", help="class map (default: configs/class_map.yaml)")

    extract = commands.add_parser(
        "extract",
        help="take frames and sounds out of mp4 files; exit 1 where videos are bad",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    extract.add_argument(
        "--videos",
        required=True,
        help="the folder that holds SPLIT/CATEGORY/NAME.mp4 (as AVSBench's raw_videos) or NAME.mp4",
    )
    extract.add_argument(
        "--csv",
        help="AVSBench's s4_meta_data.csv or ms3_meta_data.csv, or one with its columns; without it the one in --out",
    )
    extract.add_argument(
        "--out",
        required=True,
        help="the folder that holds Single-source/ or Multi-sources/ afterwards; finished clips in it are kept",
    )
    extract.add_argument(
        "--dataset", choices=("s4", "ms3"), default="s4", help="which of the two trees"
    )
    extract.add_argument(
        "--size",
        type=int,
        default=224,
        help="height and width of the frames in pixels; the masks' size",
    )
    extract.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    extract.add_argument(
        "--whole",
        action="store_true",
        help="the videos are not trimmed: each clip begins at its start, in seconds, in the CSV",
    )

    check = commands.add_parser("check", help="read a whole tree and report; exit 1 on errors")
    check.add_argument(
        "--root", required=True, help="the folder that holds Single-source/ or Multi-sources/"
    )

    pack = commands.add_parser("pack", help="build the packed cache of a config")
    pack.add_argument(
        "--cfg", nargs="+", default=[], metavar="FILE", help="YAML files, overlaid left to right"
    )
    pack.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


def main(given):
    names = lambda text: (
        [name.strip() for name in text.split(",") if name.strip()] if text else None
    )
    if given.command == "synth":
        from atlas.runs import SYNTHETIC

        counts = {
            split: getattr(given, split) for split in ("train", "val", "test") if split in given
        }  # else the data set's own default
        SYNTHETIC[given.dataset](
            given.out, given.seed, given.size, **counts, classes=names(given.classes)
        )
        print(f"{given.out}: done")
    elif given.command == "compose":
        from atlas.prepare.compose import compose_ms3, compose_s4

        compose = {"s4": compose_s4, "ms3": compose_ms3}[given.dataset]
        clips = (
            {"clips": given.clips} if "clips" in given else {}
        )  # else the data set's own default
        sources = {"voc": given.voc, "davis": given.davis, "esc": given.esc}
        report = compose(
            given.out,
            **sources,
            **clips,
            seed=given.seed,
            size=given.size,
            classes=names(given.classes),
            class_map=given.map,
        )
        for name, splits in report["kept"].items():
            counts = ", ".join(
                f"{split} {s['clips']} clips of {s['picture_sources']} pictures, {s['recordings']} sounds"
                for split, s in splits.items()
            )
            print(f"kept     {name}: {counts}")
        for name, reason in report["dropped"].items():
            print(f"dropped  {name}: {reason}")
        print(
            f"{given.out}: {len(report['clips'])} clips; what each is made of stands in {given.out}/compose.json"
        )
    elif given.command == "extract":
        from atlas.prepare.extract import extract

        done = extract(
            given.videos, given.out, given.csv, given.dataset, given.size, given.jobs, given.whole
        )
        for video, reason in done["bad"][:20]:
            print(f"bad      {video}: {reason}")
        named = f"; {done['list']} names them all" if done["bad"] else ""
        print(
            f"{given.out}: {done['extracted']} clips extracted, {done['kept']} were there already, {len(done['bad'])} bad videos{named}"
        )
        return 1 if done["bad"] else 0
    elif given.command == "check":
        from atlas.prepare.check import check

        counts, errors, warnings = check(given.root)
        print(
            "\n".join(
                [*counts, *(f"warning: {w}" for w in warnings), *(f"error: {e}" for e in errors)]
            )
        )
        print(f"{len(errors)} errors, {len(warnings)} warnings")
        return 1 if errors else 0
    elif given.command == "pack":
        from atlas.runs import open_data

        files = [word for word in given.cfg if "=" not in word]
        config = load_config(files, [word for word in given.cfg if "=" in word] + given.overrides)
        cache, _ = open_data(config)
        print(
            f"{cache.folder}: {len(cache.clips)} clips, {sum(a.nbytes for a in cache.arrays.values()) / 2**20:.0f} MB"
        )
    return 0


if __name__ == "__main__":
    given = parse()
    with one_line_errors():
        sys.exit(main(given))
