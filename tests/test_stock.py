"""Which classes a composed set keeps, how sources are divided, and drawing from them evenly."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from atlas.clips import SPLITS
from atlas.errors import AtlasError
from atlas.prepare.scan import Picture
from atlas.prepare.stock import choose_classes, deck, showing, split_sources, stand_together


def picture(name, contains, shows=None):
    return Picture(
        name,
        f"voc/{name}",
        (Path(name),),
        (Path(name),),
        {},
        frozenset(contains),
        frozenset(shows or contains),
    )


def test_three_sources_of_pictures_and_of_sounds_keep_a_class():
    seen = {**{f"p{k}": {"dog"} for k in range(3)}, "q": {"dog", "sofa"}, "r": {"cat"}}
    heard = {**{f"s{k}": {"dog"} for k in range(3)}, **{f"t{k}": {"cat"} for k in range(9)}}
    kept, dropped = choose_classes(seen, heard, ["dog", "cat"], None)
    assert kept == ["dog"]
    assert dropped == {
        "cat": "1 of the 3 picture sources needed",
        "sofa": "1 of the 3 picture sources needed, 0 of the 3 recordings needed",
    }
    with pytest.raises(
        AtlasError, match="only dog is left of the 2 classes needed .cat: 1 of the 3"
    ):
        choose_classes(seen, heard, ["dog", "cat"], None, least=2)


def test_every_class_has_a_source_in_every_split_and_most_in_train():
    sources = {
        **{f"d{k}": {"dog"} for k in range(20)},
        **{f"c{k}": {"cat", "dog"} for k in range(3)},
        "x": {"sofa"},
    }
    for seed in range(10):
        split_of = split_sources(sources, ["cat", "dog"], np.random.default_rng(seed), "pictures")
        assert split_of.keys() == sources.keys()
        assert {split_of[f"c{k}"] for k in range(3)} == set(SPLITS)
        assert Counter(split_of[f"d{k}"] for k in range(20))["train"] in (12, 13, 14)
    with pytest.raises(AtlasError, match="the pictures of cat cannot be divided"):
        split_sources({"a": {"cat"}, "b": {"cat"}}, ["cat"], np.random.default_rng(0), "pictures")


def test_every_split_can_put_something_beside_each_class():
    pictures = (
        [picture(f"cat{k}", ["cat"]) for k in range(3)]
        + [picture(f"dog{k}", ["dog"]) for k in range(3)]
        + [picture("mixed", ["cat", "dog"])]
    )
    sources = {p.source: set(p.shows) for p in pictures}
    fits = lambda share, name: stand_together(share, {"cat", "dog"})
    for seed in range(10):
        split_of = split_sources(
            sources, ["cat", "dog"], np.random.default_rng(seed), "pictures", pictures, fits
        )
        for split in SPLITS:
            here = [p for p in pictures if split_of[p.source] == split]
            assert showing(here, "cat", {"dog"}) and showing(here, "dog", {"cat"})
    with pytest.raises(AtlasError, match="and of others to stand beside it, cannot be divided"):
        split_sources(
            sources,
            ["cat", "dog"],
            np.random.default_rng(0),
            "pictures",
            pictures,
            lambda share, name: False,
        )


def test_a_deck_draws_every_source_as_often():
    draw = deck([("a", 1), ("a", 2), ("b", 3)], np.random.default_rng(0))
    assert Counter(next(draw) for _ in range(40)) == {1: 10, 2: 10, 3: 20}
    assert next(deck([], np.random.default_rng(0)), None) is None
