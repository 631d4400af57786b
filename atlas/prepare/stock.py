"""What a composed set may be made of: the classes that have enough, their pictures and recordings divided into splits, and decks to draw from.

Pictures, videos and recordings never cross splits: it is sources that are divided (scan.py says what a source is).
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atlas.clips import SPLITS
from atlas.errors import AtlasError
from atlas.prepare.scan import read_class_map, scan_davis, scan_esc, scan_voc

CLASS_MAP = Path(__file__).parents[2] / "configs" / "class_map.yaml"
SHARE = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the sources of a class
RESTARTS = 1000


@dataclass(frozen=True)
class Stock:
    """What a set is made of: pictures {split: [Picture]} and recordings {split: [(file, source, class)]}; no source is in two splits."""

    pictures: dict
    recordings: dict
    kept: list  # classes that are heard
    counts: dict  # split -> clips (S4: of a class)
    rng: np.random.Generator
    report: dict


def take_stock(
    out, voc, davis, esc, seed, counts, size, classes, class_map, progress, fits, least=1
):
    """Check the arguments, read the folders, choose the classes (`least` of them or more) and divide the sources: a Stock.

    fits(pictures of a split, class, kept classes): whether a clip that sounds the class can be made of them.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AtlasError(
            f"{out} exists and is not an empty folder: give another --out, or remove it first"
        )
    if not (voc or davis) or not esc:
        raise AtlasError(
            "compose needs pictures and sounds: give --esc, and --voc or --davis or both"
        )
    if min(counts.values()) < 1 or size < 32 or size % 2 or seed < 0:
        raise AtlasError(
            f"compose: at least one clip a class and split, an even frame size of 32 or more, a seed from 0; got {counts}, {size}, {seed}"
        )
    names = read_class_map(class_map or CLASS_MAP)
    if strange := sorted(set(classes or ()) - set(names)):
        raise AtlasError(
            f"unknown class {', '.join(strange)} in --classes; the class map knows {', '.join(sorted(names))}"
        )

    pictures, unknown = scan_voc(voc, names, progress) if voc else [], []
    if davis:
        pictures += scan_davis(davis, names, unknown, progress)
    pictures = [p for p in pictures if p.shows]
    recordings = scan_esc(esc, names)
    seen = _by_source((p.source, c) for p in pictures for c in p.shows)
    heard = _by_source((source, c) for _, source, c in recordings)
    kept, dropped = choose_classes(seen, heard, names, classes, least)

    rng = np.random.default_rng(seed)
    picture_split = split_sources(
        seen, kept, rng, "pictures", pictures, lambda share, name: fits(share, name, kept)
    )
    sound_split = split_sources(heard, kept, rng, "recordings")
    report = {
        "seed": seed,
        "arguments": {**{key: path and Path(path).resolve().name for key, path in (("voc", voc), ("davis", davis), ("esc", esc))}, "clips": counts,
                      "size": size, "classes": sorted(classes) if classes else None, "class_map": Path(class_map or CLASS_MAP).name},
        "kept": {c: {split: {"clips": 0,
                             "picture_sources": sum(c in has and picture_split[source] == split for source, has in seen.items()),
                             "recordings": sum(c in has and sound_split[source] == split for source, has in heard.items())}
                     for split in SPLITS} for c in kept},
        "dropped": dropped, "unknown": unknown, "clips": [],
    }  # fmt: skip
    pictures = {
        split: [p for p in pictures if picture_split[p.source] == split] for split in SPLITS
    }
    recordings = {split: [r for r in recordings if sound_split[r[1]] == split] for split in SPLITS}
    return Stock(pictures, recordings, kept, counts, rng, report)


def choose_classes(seen, heard, names, classes, least=1):
    """(`least` or more kept classes, {dropped class: why}): three picture sources and three recordings are the least that three splits need."""
    kept, dropped = [], {}
    for name in sorted(set(names).union(*seen.values())):
        have = {
            what: sum(name in has for has in of.values())
            for what, of in (("picture sources", seen), ("recordings", heard))
        }
        if classes and name not in classes:
            dropped[name] = "not in --classes"
        elif min(have.values()) < 3:
            dropped[name] = ", ".join(
                f"{n} of the 3 {what} needed" for what, n in have.items() if n < 3
            )
        else:
            kept.append(name)
    if len(kept) < least:
        left = (
            f"only {', '.join(kept)} is left of the {least} classes needed"
            if kept
            else "no class is left"
        )
        why = "; ".join(f"{c}: {reason}" for c, reason in dropped.items())
        raise AtlasError(f"{left} ({why}): add pictures or sounds, or change the class map")
    return kept, dropped


def split_sources(sources, kept, rng, what, pictures=(), fits=None):
    """{source: split} for sources {source: classes}: every kept class gets a source in every split, and else about SHARE of its sources.

    With `fits`, every split's share of `pictures` also satisfies fits(share, class): something can stand beside the class.
    Greedy, rarest class first; a source may serve several classes, so a bad draw is thrown away and drawn again.
    """
    of_class = {c: sorted(s for s, has in sources.items() if c in has) for c in kept}
    order = sorted(kept, key=lambda c: len(of_class[c]))
    rest = sorted(s for s, has in sources.items() if not has & set(kept))
    failures = Counter()
    for _ in range(RESTARTS):
        split_of = {}
        for mine in [*(of_class[c] for c in order), rest]:
            got = Counter(split_of[s] for s in mine if s in split_of)
            for source in rng.permutation([s for s in mine if s not in split_of]).tolist():
                split = max(
                    ("train", "test", "val"),
                    key=lambda x: (not got[x], SHARE[x] * len(mine) - got[x]),
                )
                split_of[source] = split
                got[split] += 1
        lacking = [c for c in order if len({split_of[s] for s in of_class[c]}) < len(SPLITS)]
        shares = [
            [p for p in pictures if split_of[p.source] == split]
            for split in SPLITS
            if fits and not lacking
        ]
        alone = [c for c in kept if not all(fits(share, c) for share in shares)]
        if not lacking and not alone:
            return split_of
        failures[lacking[0] if lacking else f"{alone[0]}, and of others to stand beside it,"] += 1
    raise AtlasError(f"the {what} of {failures.most_common(1)[0][0]} cannot be divided into train, val and test without sharing a source: "
                     "add some, or leave a class out with --classes")  # fmt: skip


def showing(pictures, name, without=frozenset()):
    """The pictures that show class `name` and have no pixel of the classes `without`."""
    return [p for p in pictures if name in p.shows and not p.contains & without]


def stand_together(pictures, cast):
    """Whether every class of the set `cast` has a picture without a pixel of the others."""
    return all(showing(pictures, name, cast - {name}) for name in cast)


def shown_classes(pictures):
    """The classes that any of the pictures shows, in order."""
    return sorted({c for p in pictures for c in p.shows})


def deck(items, rng):
    """Endless draw from [(source, item)]: every source once a round, in a new order each time, and its items in turn."""
    piles = defaultdict(list)
    for source, item in items:
        piles[source].append(item)
    piles = {
        source: [pile[k] for k in rng.permutation(len(pile))]
        for source, pile in sorted(piles.items())
    }
    while piles:
        for source in rng.permutation(list(piles)).tolist():
            piles[source].append(piles[source].pop(0))
            yield piles[source][-1]


def picture_deck(pictures, rng):
    """Endless draw of pictures, every source as often."""
    return deck([(p.source, p) for p in pictures], rng)


def sound_deck(stock, split, name):
    """Endless draw of recordings of class `name`, (file, source, class), every source as often."""
    return deck([(r[1], r) for r in stock.recordings[split] if r[2] == name], stock.rng)


def _by_source(pairs):
    """{source: {class, ...}} from (source, class) pairs."""
    sources = defaultdict(set)
    for source, name in pairs:
        sources[source].add(name)
    return dict(sources)
