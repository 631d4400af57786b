"""The comparison table, against results made by hand."""

import copy
import re

import pytest
from conftest import ROOT

from atlas.errors import AtlasError
from atlas.metrics import continual_metrics
from atlas.report.packed import read_runs
from atlas.report.table import (
    brief,
    by_class,
    cell,
    comparison,
    holm,
    joint_of,
    paired_p,
    problems,
    rows_of,
    scores_of,
)

TASKS = []
for number in range(3):
    clips = {"train": 4, "val": 2, "test": 2}
    TASKS.append({"name": f"t{number}", "classes": [f"c{number}"], "clips": clips})


def made(method="lra", seed=0, shift=0.0, complete=True, protocol="cil", tasks=TASKS, **keys):
    """The results of a run over 3 tasks whose J is `shift` above a fixed matrix."""
    R = [
        [0.1, 0.1, 0.1],
        [0.6 + shift, 0.2, 0.1],
        [0.5 + shift, 0.6 + shift, 0.2],
        [0.4 + shift, 0.5 + shift, 0.6 + shift],
    ]
    if method == "joint":
        R = [[0.1, 0.1, 0.1], [0.8 + shift, 0.7 + shift, 0.9 + shift]]
    config = {
        "name": None,
        "method": method,
        "seed": seed,
        "data_root": "data",
        "protocol": protocol,
        "dataset": "s4",
        "base": 1,
        "step": 1,
        "lra_lambda": 1.0,
        "lr": 1e-3,
        "joint_run": None,
    }
    results = {
        "schema": 1,
        "method": method,
        "protocol": protocol,
        "seed": seed,
        "complete": complete,
        "config": config | keys,
        "tasks": tasks,
        "drifts": [],
        "metrics": {"J": continual_metrics(R), "F": continual_metrics(R), "listening": 0.2 + shift},
        "matrix": {"J": R, "F": R},
        "val_matrix": {"J": R},
        "seconds": {"train": [1.0, 2.0], "consolidate": [0.5], "evaluate": [4.0]},
        "environment": {"device": "cpu", "threads": 1},
        "commit": "0123456789abcdef",
        "dirty": False,
    }
    return copy.deepcopy(results)


def cells(line):
    return [part.strip() for part in line.strip("|").split("|")]


def row(table, label):
    """{column: cell} of the row `label` of a Markdown table."""
    lines = table.splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    line = next(line for line in lines if line.startswith(f"| {label} |"))
    return dict(zip(cells(head), cells(line), strict=True))


def labels(table):
    return [cells(line)[0] for line in table.splitlines() if line.startswith("| ")][2:]


def test_the_paired_t_test():
    # d = 1, 0, 2, 2: t = 2.611 with 3 degrees of freedom
    assert paired_p([1, 2, 3, 4], [0, 2, 1, 2]) == pytest.approx(0.080, abs=0.001)
    assert paired_p([0, 2, 1, 2], [1, 2, 3, 4]) == pytest.approx(0.080, abs=0.001)
    assert paired_p([1, 2], [1, 2]) == 1
    assert paired_p([1.5, 2.5], [1, 2]) == 0


def test_mean_deviation_and_best():
    runs = [made(seed=s, shift=0.1 + d) for s, d in enumerate((0, 0.01, 0.02))]
    runs += [made("finetune", s, d) for s, d in enumerate((0, 0.011, 0.019))]
    table = comparison(runs)
    lra, finetune = row(table, "lra"), row(table, "finetune")
    assert lra["J final"] == "**0.610 ± 0.010**" and finetune["J final"] == "0.510 ± 0.010"
    assert lra["runs"] == "3" and lra["s train / consolidate / evaluate"] == "3 / 0 / 4"
    assert "**" in lra["J listening"]
    assert lra["J intransigence"] == finetune["J intransigence"] == "not run"
    assert "paired t-test" in table and "CAUTION" not in table
    assert lra["Δ to finetune"].startswith("+0.100 (p 0.00")
    assert finetune["Δ to finetune"] == "–"


def test_rows_are_ranked_by_validation_clips_and_joint_comes_last():
    runs = [made("joint"), made("ewc"), made("lra"), made("finetune", complete=False), made("si")]
    for results, J in zip(runs, (0.9, 0.2, 0.4, 0.8, 0.3)):
        results["val_matrix"]["J"][-1] = [J, J, J]
    table = comparison(runs)
    assert labels(table) == ["lra", "si", "ewc", "finetune", "joint"]
    assert row(table, "si")["val J final"] == "0.300"


def test_the_gain_is_on_the_finetune_that_validation_prefers_and_holm_corrects():
    runs = [made("finetune", s, d, lr=0.1) for s, d in enumerate((0, 0.011, 0.019))]
    for results in runs:
        results["val_matrix"] = {"J": [[0.1] * 3] * 4}
    runs += [made("finetune", s, 0.1 + d, lr=1.0) for s, d in enumerate((0, 0.01, 0.02))]
    runs += [made("ewc", s, 0.2 + d) for s, d in enumerate((0, 0.012, 0.018))]
    runs += [made("joint", s, 0.3) for s in range(3)]
    table = comparison(runs)
    assert row(table, "finetune lr=1.0")["Δ to finetune"] == "–"
    assert row(table, "ewc")["Δ to finetune"].startswith("+0.100 (p 0.00")
    assert row(table, "finetune lr=0.1")["Δ to finetune"].startswith("-0.100 (p 0.00")
    assert "p" not in row(table, "joint")["Δ to finetune"]
    # 4 tests: .01 x 4, .02 x 3, then .03 x 2 = .06 and .9 x 1
    assert holm({"d": 0.9, "a": 0.01, "c": 0.03, "b": 0.02}) == {
        "a": pytest.approx(0.04),
        "b": pytest.approx(0.06),
        "c": pytest.approx(0.06),
        "d": 0.9,
    }
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_two_seeds_are_not_tested_and_that_is_said():
    runs = [made(seed=s, shift=0.1) for s in (0, 1)] + [made("finetune", s) for s in (0, 1)]
    table = comparison(runs)
    assert row(table, "lra")["Δ to finetune"] == "+0.100"
    assert "not tested with fewer than 3 seeds." in table


def test_intransigence_is_against_the_joint_run_of_the_same_seed():
    runs = [made(seed=0), made(seed=1), made("joint", 0), made("joint", 1, 0.05)]
    assert [joint_of(r, runs)["seed"] for r in runs[:2]] == [0, 1]
    for results, joint in (runs[::2], runs[1::2]):
        best = joint["matrix"]["J"][-1]
        expected = continual_metrics(results["matrix"]["J"], best)["intransigence"]
        assert scores_of(results, joint)["J intransigence"] == pytest.approx(expected)
    table = comparison(runs)
    joint = row(table, "joint")
    assert row(table, "lra")["J intransigence"] == "0.225 ± 0.035"
    assert joint["J intransigence"] == joint["J forgetting"] == "–"
    assert "**" not in joint["J final"]
    of_one = row(comparison(runs[:3]), "lra")["J intransigence"]
    assert of_one == "0.200 (1)"  # of one of the two seeds
    others = [
        made("joint", 0, tasks=TASKS[::-1]),
        made("joint", 0, complete=False),
        made("joint", 0, data_root="elsewhere"),
    ]
    assert joint_of(runs[0], others) is None
    nearest = joint_of(runs[0], [made("joint", 0, lr=1.0), runs[2]])
    assert nearest is runs[2]


def test_rows_that_were_not_scored_leave_what_needs_them_undefined():
    results, joint = made(), made("joint")
    results["matrix"]["J"][2] = None
    assert scores_of(results, joint)["J intransigence"] is None
    results["metrics"]["J"] |= {"forgetting": None}
    results["val_matrix"]["J"][-1] = None
    found = row(comparison([results]), "lra")
    assert found["J forgetting"] == found["val J final"] == "–"


def test_settings_of_a_method_are_rows_and_protocols_are_tables():
    runs = [made(), made(lra_lambda=3.0), made("finetune"), made(protocol="til")]
    runs.append(made("frozen", complete=False))
    found = problems(runs)
    assert [p["title"] for p in found] == ["TIL", "CIL"]
    expected = ["lra", "lra lra_lambda=3.0", "finetune", "frozen"]
    assert [r["label"] for r in found[1]["rows"]] == expected
    til, cil = comparison(runs).split("### CIL")
    for table, method in ((til, "finetune"), (cil, "frozen")):
        assert set(list(row(table, method).values())[2:]) == {"not run"}
    assert "Left out as unfinished: frozen (1)." in cil and "unfinished" not in til


def test_a_null_rate_or_strength_stands_for_the_default_of_the_method():
    runs = [made(lr=None, lr_first=1e-3), made(seed=1, lr=1e-3, lr_first=1e-3)]
    assert [r["label"] for r in rows_of("lra", runs)] == ["lra"]
    runs = [made("lwf", strength=None), made("lwf", 1, strength=1.0), made("lwf", 2, strength=9)]
    assert [r["label"] for r in rows_of("lwf", runs)] == ["lwf", "lwf strength=9"]


def test_the_brief_table_has_a_row_a_method_and_the_cells_of_the_long_one():
    runs = [made("finetune", s, 0.011 * s) for s in range(3)] + [made("joint")]
    for s in range(3):
        runs += [made(seed=s, shift=0.1 + 0.01 * s, protocol=p) for p in ("til", "cil")]
    long = dict(zip(("TIL", "CIL"), comparison(runs).split("### CIL")))
    for method in ("lra", "finetune", "joint"):
        found = row(brief(runs), method)
        base = {"TIL": "lra", "CIL": "finetune"}  # TIL has no finetune
        columns = ("J final", "Δ to {}", "J forgetting", "J listening")
        names = [f"{p}: {column.format(base[p])}" for p in long for column in columns]
        assert list(found) == ["method", *names]
        for name in names:
            protocol, _, column = name.partition(": ")
            assert found[name] == row(long[protocol], method)[column]
    assert brief(runs).splitlines()[-1].startswith("| joint | not run | not run |")
    more = runs + [made(lra_lambda=3.0)]  # a setting stands beside its method
    assert labels(brief(more)) == ["finetune", "lra", "lra lra_lambda=3.0", "joint"]


def test_the_scores_of_single_classes_are_means_over_seeds_the_hardest_first():
    runs = [made("lra", seed) for seed in range(2)] + [made("joint"), made("ewc")]
    for results, of_classes in zip(runs, ([0.2, 0.8], [0.4, 0.7], [0.9, 0.5], [None, 0.6])):
        results["class_matrix"] = {"classes": ["dog", "cat"], "J": [[0.0, 0.0], of_classes]}
    lines = by_class(runs).splitlines()
    assert lines[:3] == ["### CIL", "", "| class | lra | ewc | joint |"]
    assert lines[4:] == [
        "| dog | 0.300 ± 0.141 | – | 0.900 |",
        "| cat | 0.750 ± 0.071 | 0.600 | 0.500 |",
    ]


def test_runs_over_other_classes_or_other_tasks_are_not_compared():
    other = [task | {"classes": [f"x{j}"]} for j, task in enumerate(TASKS)]
    found = problems([made(), made(step=2), made("finetune", step=2)])
    assert [p["title"] for p in found] == ["CIL · step=1", "CIL · step=2"]
    found = problems([made(), made(tasks=other, data_root="open")])
    assert [p["title"] for p in found] == ["CIL · data_root=data", "CIL · data_root=open"]


def test_what_else_differs_is_said():
    caution = "CAUTION: the methods also differ in lr."
    assert caution in comparison([made(), made("finetune", lr=1.0)])
    alike = made("finetune", lra_lambda=2.0, joint_run="x", name="y", watch=True)
    assert "CAUTION" not in comparison([made(), alike])
    elsewhere = made(data_root="other")  # a seed on other data counts as another seed
    assert row(comparison([made(), elsewhere]), "lra")["runs"] == "2"
    newer = made("finetune") | {"commit": "f" * 40, "dirty": True}
    table = comparison([made(), made(seed=1), newer])
    assert "Runs of several commits: 01234567 (2), ffffffff with changes (1)." in table
    assert "commits" not in comparison([made(), made(seed=1)])


def test_the_same_run_twice_counts_once_and_two_runs_of_one_config_are_an_error():
    assert row(comparison([made(), made()]), "lra")["runs"] == "1"
    with pytest.raises(AtlasError, match="two of the runs are lra, cil, seed 0 on data"):
        comparison([made(), made(shift=0.1, name="again")])
    empty = rows_of("ewc", [made()])
    assert [r["label"] for r in empty] == ["ewc"]
    assert cell(empty[0], "J final", []) == "not run"


@pytest.mark.parametrize("name, rows", [
    ("til", 7), ("cil", 9), ("dil", 7), ("tfcl", 7), ("open_tfcl", 10), ("openavs", 6),
    ("openavs_parts", 12), ("ablate_cil", 8), ("ablate_tfcl", 6),
])  # fmt: skip
def test_the_results_in_the_repository_are_whole(name, rows):
    runs = read_runs(ROOT / "docs" / "results" / f"{name}.json")
    assert all(results["complete"] for results in runs)
    table = comparison(runs)
    assert len(labels(table)) == rows and "unfinished" not in table
    seeds = {cells(line)[1] for line in table.splitlines() if line.startswith("| ")}
    assert seeds - {"runs", "---"} <= {"2", "3", "5"}


def test_the_tables_of_the_document_are_what_their_commands_print():
    path = ROOT / "docs" / "results.md"
    if not path.is_file():
        pytest.skip("no docs/results.md")
    text = path.read_text(encoding="utf-8")
    commands = re.findall(r"python eval\.py (docs/results/\S+(?: \S+)*) --brief", text)
    for command in commands:
        runs = []
        for file in expanded(command.split()):
            runs += read_runs(ROOT / file)
        assert brief(runs) in text, command


def expanded(words):
    """Words with the shell's {a,b} filled in."""
    found = []
    for word in words:
        head, brace, rest = word.partition("{")
        names, _, tail = rest.partition("}")
        found += [head + name + tail for name in names.split(",")] if brace else [word]
    return found
