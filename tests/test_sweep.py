import json
import re
import shlex
import time
from pathlib import Path

import pytest
from conftest import LIGHT, ROOT, TINY, run

from atlas import sweep
from atlas.config import FIELDS, as_dict
from atlas.methods import METHODS


def parse(*words):
    return sweep.parse_arguments("What the script does.", [str(word) for word in words])


def refused(capsys, *words):
    """The one line on stderr of a command line that is refused."""
    with pytest.raises(SystemExit) as end:
        parse(*words)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "error: " in lines[-1], lines
    assert len(lines) == 1 or (len(lines) == 2 and lines[0].startswith("usage: ")), lines
    return lines[-1]


def finish(folder, config, val=0.2, test=0.9):
    """A results.json as a finished run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "schema": 1,
        "complete": True,
        **{key: getattr(config, key) for key in ("method", "protocol", "seed")},
        "config": as_dict(config),
        "environment": {},
        "tasks": [],
        "matrix": {},
        "val_matrix": {"J": [[0.0], None, [val]]},
        "metrics": {"J": {"final": test, "forgetting": None}},
        "seconds": {"train": [60, 60], "consolidate": [], "evaluate": [0.0, 30]},
    }
    (folder / "results.json").write_text(json.dumps(results))


class Fake:
    """In the place of train.py: it finishes every run, but for those whose words hold `fails`."""

    def __init__(self, fails="nothing"):
        self.fails, self.begun = fails, []

    def __call__(self, words, errors, jobs):
        files, keys = sweep.files_and_keys(
            [word for word in words if word not in ("--resume", "--cfg")]
        )
        (point,) = sweep.grid(files, keys)
        self.begun.append(point.folder.name)
        if self.fails in words:
            errors.write_text("a warning\nerror: it broke\n\n")
            return 1
        errors.write_text("a warning\n")
        finish(point.folder, point.config, val=point.config.lra_lambda)
        return 0


@pytest.mark.parametrize(
    "text, values",
    [
        ("a,b", ["a", "b"]),
        ("a", ["a"]),
        ("", [""]),
        ("1e-3, 1e-4", ["1e-3", "1e-4"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,b],[b,a]", ["[a,b]", "[b,a]"]),
        ("{x: [a,b], y: [c]}", ["{x: [a,b], y: [c]}"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("a{1,2}(b,c)", ["a{1,2}(b,c)"]),
        ("o'neil,b", ["o'neil", "b"]),
        ("a),(b,c)", ["a)", "(b,c)"]),
    ],
)
def test_a_comma_separates_values_unless_it_is_protected(text, values):
    assert sweep.split_values(text) == values
    assert [sweep.split_values(value) for value in values] == [[value] for value in values]


def test_the_grid_is_every_combination():
    given = parse("method=lra,ewc", "seed=0,1", "base=3", "data_root=data/open{seed}", "--jobs", 2)
    assert given.is_grid and given.jobs == 2 and not given.resume
    names = ["cil_lra_seed0", "cil_lra_seed1", "cil_ewc_seed0", "cil_ewc_seed1"]
    assert [str(point.folder) for point in given.points] == [f"runs/{name}" for name in names]
    assert [point.setting for point in given.points] == ["method=lra"] * 2 + ["method=ewc"] * 2
    assert [p.config.data_root for p in given.points] == ["data/open0", "data/open1"] * 2
    assert {point.config.base for point in given.points} == {3}


def test_one_value_for_each_key_is_a_single_run():
    given = parse("--cfg", ROOT / "configs/ss_til.yaml", "seed=1", "--resume", 'name="a,b"')
    assert not given.is_grid and given.resume
    assert (given.config.protocol, given.config.seed, given.config.name) == ("til", 1, "a,b")
    given = parse("class_order=[a,b]")
    assert not given.is_grid and given.config.class_order == ["a", "b"]


def test_folders_are_named_by_what_varies():
    def names(*words):
        return [point.folder.name for point in parse(*words).points]

    assert names("lr=1e-3,null", "epochs=2") == ["cil_lra_seed0_lr-1e-3", "cil_lra_seed0_lr-null"]
    assert names("name=first", "seed=0,1") == ["first_seed0", "first_seed1"]
    assert names("name=a", "protocol=til,dil", "base=2,3")[0] == "a_til_base-2"
    assert names("class_order=[a,b],[b, a]") == [
        "cil_lra_seed0_class_order--a-b-",
        "cil_lra_seed0_class_order--b-a-",
    ]
    assert names("data_root=data/a,~/b")[0] == "cil_lra_seed0_data_root-data-a"
    for name in names("name='x=1,y'", "visual=a/b.c,d"):
        assert re.fullmatch("[A-Za-z0-9._-]+", name)


def test_options_stand_anywhere_and_the_last_of_two_equal_keys_wins(tmp_path):
    (tmp_path / "a=1,b").mkdir()
    first, second = tmp_path / "a=1,b" / "config.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 0.5\nseed: 3\n")
    second.write_text("lr: 0.25\n")
    given = parse("base=2", "--cfg", first, "base=3", "--resume", "base=4", "--cfg", second)
    config = given.config
    assert (config.lr, config.seed, config.base, given.resume) == (0.25, 3, 4, True)
    assert not parse("seed=0,1", "seed=2").is_grid
    assert parse("--cfg", first, "seed = 4").config.seed == 4


@pytest.mark.parametrize(
    "words, what",
    [
        (["lora_rnk=8"], "lora_rank"),
        (["lora_rnk=8,4"], "lora_rank"),
        (["lora_rnk=8,4", "--print"], "lora_rank"),
        (["method=lra,lara"], "lara"),
        (["seed=0,1", "lora_rank=0,16", "lra_scope=lora"], "lora_rank=0"),
        (["seed", "=", "1"], "without blanks"),
        (["seed", "=1"], "without blanks"),
        (["seed=", "1"], "keys are key=value"),
        (["seed=0,0"], "would share"),
        (["visual=a/b,a-b"], "would share"),
        (["--jobs", "0"], "at least 1"),
        (["--jobs", "two"], "--jobs"),
        (["--seed", "1"], "--seed"),
        (["--cfg", "configs/ss_cli.yaml"], "config file configs/ss_cli.yaml: No such file"),
        (["--cfg", "configs"], "config file configs: Is a directory"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_2(capsys, monkeypatch, words, what):
    monkeypatch.chdir(ROOT)
    assert what in refused(capsys, *words)


def test_torchrun_takes_one_run(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(capsys, "seed=0,1")
    assert parse("seed=1").config.seed == 1


def test_help_fits_80_columns_and_names_every_key_under_its_title(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 80
    source = (ROOT / "atlas/config.py").read_text().partition("class Config")[2]
    expected = re.findall(r"^    (?:# (-- \w+)|(\w+): )", source, re.MULTILINE)
    keys = text.partition("keys=defaults:")[2]
    shown = re.findall(r"^(?:(-- \w+)$|  (\w+)=)", keys, re.MULTILINE)
    assert shown == expected and len(shown) == len(FIELDS) + 6
    assert all(f"\n    {name} " in text for name in METHODS)


def test_printed_commands_are_the_runs_of_the_grid(capsys, tmp_path):
    file = tmp_path / "a b=1.yaml"
    file.write_text("base: 2\n")
    given = parse("--cfg", file, "seed=0,1", f"out_dir={tmp_path}/o{{seed}}", "--print")
    assert sweep.run_grid(given, None, start=None) == 0
    lines = capsys.readouterr().out.splitlines()
    again = [parse(*shlex.split(line)[2:]) for line in lines]
    assert [one.config for one in again] == [point.config for point in given.points]
    assert all(one.resume and not one.is_grid for one in again)


def test_a_grid_runs_skips_and_ranks_by_validation(tmp_path, capsys):
    words = [f"out_dir={tmp_path}", "lra_lambda=0.25,0.5", "seed=0,1", "--jobs", 2]
    fake, tables = Fake(), []

    def table(runs):
        tables.append(runs)
        return "the table"

    assert sweep.run_grid(parse(*words), table, start=fake) == 0
    out = capsys.readouterr().out
    assert [found["config"]["lra_lambda"] for found in tables[0]] == [0.5, 0.5, 0.25, 0.25]
    assert out.endswith("the table\n") and len(fake.begun) == 4
    assert not list(tmp_path.glob("*.err"))

    again = Fake()
    assert sweep.run_grid(parse(*words), table, start=again) == 0 and again.begun == []
    assert sweep.run_grid(parse(*words, "lra_lambda=0.25,1"), table, start=again) == 0
    assert sorted(again.begun) == [f"cil_lra_seed{seed}_lra_lambda-1" for seed in (0, 1)]


def test_what_fails_is_said_and_its_last_words_are_kept(tmp_path, capsys):
    words = [f"out_dir={tmp_path}", "method=lra,ewc,mas"]
    assert sweep.run_grid(parse(*words), len, start=Fake(fails="method=ewc")) == 1
    out, err = capsys.readouterr()
    assert "error: it broke" in err and "1 of 3 runs failed" in err and "broke" not in out
    assert (tmp_path / "cil_ewc_seed0.err").read_text() == "a warning\nerror: it broke\n\n"
    assert f"{tmp_path}/cil_ewc_seed0.err" in err and out.endswith("\n2\n")
    assert sweep.run_grid(parse(*words), len, start=Fake()) == 0
    assert not list(tmp_path.glob("*.err"))


def test_a_finished_run_of_another_config_is_not_taken_for_this_one(tmp_path):
    words = [f"out_dir={tmp_path}", "seed=0,1"]
    assert sweep.run_grid(parse(*words), len, start=Fake()) == 0
    other, same = Fake(fails="epochs=3"), Fake()  # train.py refuses to resume another config
    assert sweep.run_grid(parse(*words, "epochs=3"), len, start=other) == 1
    assert len(other.begun) == 2
    assert sweep.run_grid(parse(*words, "first_task=elsewhere"), len, start=same) == 0
    assert not same.begun


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"complete": true}', "\x00", "[" * 10**5])
def test_a_damaged_result_is_left_to_resume(tmp_path, text):
    given = parse(f"out_dir={tmp_path}", "seed=0,1")
    Path(tmp_path, "cil_lra_seed0").mkdir()
    Path(tmp_path, "cil_lra_seed0", "results.json").write_text(text)
    fake = Fake()
    assert sweep.run_grid(given, len, start=fake) == 0 and len(fake.begun) == 2


def test_after_ctrl_c_nothing_more_is_begun(tmp_path):
    begun = []

    def start(words, errors, jobs):
        begun.append(words)
        time.sleep(0.3 * (len(begun) - 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run_grid(parse(f"out_dir={tmp_path}", "seed=0,1,2,3,4,5,6,7,8"), len, start=start)
    assert len(begun) <= 2


def test_a_run_that_is_started_leaves_its_errors_in_a_file(tmp_path):
    assert sweep.start_run(["lora_rnk=8"], tmp_path / "a.err", 1) == 2
    assert (tmp_path / "a.err").read_text().startswith("error: unknown key")


def test_a_grid_through_the_command_line(tree, tmp_path):
    """Its runs are begun by processes that are forked from this one, and are finished then."""
    words = [*TINY, f"visual={LIGHT}", "epochs_first=0", "epochs=0", f"data_root={tree}"]
    words += [f"cache_dir={tmp_path / 'cache'}", f"out_dir={tmp_path / 'runs'}", "base=3,4,9"]

    def forked(words, errors, jobs):
        done = run("train.py", *words)
        errors.write_text(done.stderr)
        return done.returncode

    assert sweep.run_grid(parse(*words), len, start=forked) == 1
    assert "lower base" in (tmp_path / "runs/cil_lra_seed0_base-9.err").read_text()
    words[-1] = "base=3,4"
    done = run("train.py", *words)
    assert done.returncode == 0 and done.stdout.count("finished before: ") == 2, done.stderr
    assert "base=3" in done.stdout and "base=4" in done.stdout and "val J" in done.stdout
