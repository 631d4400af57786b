"""The README and the documents: links, keys, files and error lines that they name exist."""

import re

import pytest
from conftest import ROOT

from atlas.config import FIELDS, load_config
from atlas.sweep import files_and_keys, grid, split_word

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def commands(text, script):
    """The words of each indented command line of `script`, without comments and line ends."""
    lines = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(rf"^    python {script} (.*)$|`python {script} ([^`]+)`", lines, re.M)
    for line in lines:
        found = re.findall(r"'[^']*'|\S+", "".join(line).replace("TINY", tiny(text)))
        yield [word.strip("'") for word in found]


def tiny(text):
    """What the page says TINY stands for."""
    found = re.search(r"`TINY`\s+stands\s+for\s+`([^`]+)`", text)
    return found[1] if found else "TINY"


def anchors(text):
    """What GitHub makes of a page's titles."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_something(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, title = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if title:
            assert title in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_private_place_or_has_a_gap(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"/(work|tmp/w|home|root|Users)/", text)
    assert not re.search(r"^(TODO|PICTURE|OUTPUT|RESULTS)$|\bTIMES on disk", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_train_have_keys_and_configs_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text(encoding="utf-8"), r"train\.py"):
        words = words[: words.index(">")] if ">" in words else words
        given = [word for word in words if not word.startswith("--") and not word.isdigit()]
        if "..." in given or not given:
            continue
        files, keys = files_and_keys(given)
        assert all((ROOT / file).is_file() for file in files), words
        assert {split_word(word)[0] for word in keys} <= FIELDS.keys(), words
        new = ("method=averaging", "dataset=folders", "protocol=size")  # of docs/extend.md
        if not set(new) & set(keys):
            assert grid(files, keys), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_prepare_data_have_options_that_exist(page):
    import prepare_data

    options = {f.__name__: known.keys() for f, known in prepare_data.OPTIONS.items()}
    for name, *words in commands(page.read_text(encoding="utf-8"), r"prepare_data\.py"):
        assert {word for word in words if word.startswith("--")} <= options[name], words


def test_the_readme_is_of_one_sitting_and_names_files_that_exist():
    assert len(README.encode()) < 12_288
    table = README.partition("## Where is what")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w./]+\.py|[\w./]+/)`", table)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_defaults_that_pages_rest_on():
    assert load_config().cache_dir == "cache" and load_config().out_dir == "runs"


def test_the_lines_of_troubleshooting_are_lines_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    files = [*ROOT.glob("*.py"), *ROOT.glob("atlas/**/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    code = re.sub(r"\"\s*\n\s*f?\"", "", code)  # strings that go on in the next line
    rows = re.findall(r"^\| (?:in a grid: )?`([^`]+)` \|", text, re.M)
    assert len(rows) > 40
    for row in rows:
        pattern = ".{1,80}?".join(re.escape(part) for part in row.split("..."))
        assert re.search(pattern, code), row
