"""The fuzzer finds nothing in a handful of cases, and would find what is wrong."""

import random
from subprocess import CompletedProcess

import fuzz
import pytest


def test_broken_files_end_in_one_line_or_in_the_same_result():
    assert fuzz.fuzz(5, "test") == []


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_each_kind_breaks_its_file_as_its_draw_says(tmp_path, kind):
    found = []
    for place in (tmp_path / "one", tmp_path / "other"):
        place.mkdir()
        (place / "beside.png").write_bytes(b"picture")
        path = place / "table.csv"
        path.write_text("name,split\na,train\nb,test\n")
        kind(path, random.Random("0-0"))
        found.append(path.read_bytes() if path.is_file() else (path.is_dir(), path.is_symlink()))
    assert found[0] == found[1] != b"name,split\na,train\nb,test\n"


@pytest.mark.parametrize(
    "ends, answer, why",
    [
        ((0, ""), "whole", None),
        ((2, "error: the file is damaged"), None, None),
        ((0, ""), "other", "silent"),
        ((1, "Traceback (most recent call last):\nKeyError: 1"), None, "traceback: KeyError"),
        ((-11, ""), None, "traceback"),
        (None, None, "hangs"),
    ],
)
def test_a_case_fails_on_a_traceback_a_hang_or_a_silent_change(
    tmp_path, monkeypatch, ends, answer, why
):
    source = tmp_path / "whole"
    source.mkdir()
    (source / "video.mp4").write_bytes(b"video")

    def command(place):
        if (place / "video.mp4").read_bytes() == b"video":
            return [], "whole"
        if ends is None:
            raise fuzz.Hangs
        return [CompletedProcess([], ends[0], "", ends[1])], answer

    monkeypatch.setattr(fuzz, "TARGETS", {"video": ("video.mp4", command)})
    monkeypatch.setattr(fuzz, "KINDS", (fuzz.web_page,))
    what, found = fuzz.case(source, tmp_path / "broken", random.Random(0))
    assert what == "video: web_page video.mp4"
    assert found is None if why is None else found.startswith(why)
