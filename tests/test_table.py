"""The comparison table, against results made by hand."""

import copy

import pytest
from conftest import ROOT

from atlas.errors import AtlasError
from atlas.metrics import continual_metrics
from atlas.report.table import (
    brief,
    cell,
    comparison,
    joint_of,
    paired_p,
    problems,
    rows_of,
    two_sided_t,
    value_of,
    verdicts,
)
from atlas.results import read_results

TASKS = [
    {"name": f"t{j}", "classes": [f"c{j}"], "clips": {"train": 4, "val": 2, "test": 2}}
    for j in range(3)
]


def made(method="lra", seed=0, shift=0.0, complete=True, protocol="cil", tasks=TASKS, **keys):
    """The results of a run over 3 tasks whose J is `shift` above a fixed matrix."""
    if method == "joint":
        R = [[0.1, 0.1, 0.1], [0.8 + shift, 0.7 + shift, 0.9 + shift]]
    else:
        R = [
            [0.1, 0.1, 0.1],
            [0.6 + shift, 0.2, 0.1],
            [0.5 + shift, 0.6 + shift, 0.2],
            [0.4 + shift, 0.5 + shift, 0.6 + shift],
        ]
    metrics = {score: continual_metrics(R) for score in ("J", "F")} | {"listening": 0.2 + shift}
    config = {
        "name": None,
        "seed": seed,
        "data_root": "data",
        "protocol": protocol,
        "dataset": "s4",
        "base": 1,
        "step": 1,
        "lra_lambda": 1.0,
        "lr": 1e-3,
        "joint_run": None,
    } | keys
    return copy.deepcopy({
        "method": method, "protocol": protocol, "seed": seed, "complete": complete, "config": config | {"method": method}, "tasks": tasks, "drifts": [], "metrics": metrics,
        "matrix": {"J": R, "F": R}, "seconds": {"train": [1.0, 2.0], "consolidate": [0.5], "evaluate": [4.0]}, "environment": {"device": "cpu", "threads": 1}, "commit": "0123456789abcdef", "dirty": False,
    })  # fmt: skip


def row(table, label):
    """{column: cell} of the row `label` of a Markdown table."""
    head = [
        part.strip()
        for part in next(line for line in table.splitlines() if line.startswith("| method"))
        .strip("|")
        .split("|")
    ]
    line = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return dict(zip(head, (part.strip() for part in line.strip("|").split("|")), strict=True))


def test_the_t_test_agrees_with_tables():
    for freedom, critical in (
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (7, 2.36462),
        (10, 2.22814),
    ):
        assert (
            two_sided_t(critical, freedom)
            == pytest.approx(0.05, abs=1e-5)
            == two_sided_t(-critical, freedom)
        )
    assert paired_p([1, 2, 3, 4], [0, 2, 1, 2]) == pytest.approx(
        0.080, abs=0.001
    )  # d = 1, 0, 2, 2: t = 2.611, 3 degrees of freedom
    assert paired_p([1, 2], [1, 2]) == 1 and paired_p([1.5, 2.5], [1, 2]) == 0


def test_mean_deviation_and_best():
    table = comparison(
        [made(seed=s, shift=0.1 + d) for s, d in enumerate((0, 0.01, 0.02))]
        + [made("finetune", s, d) for s, d in enumerate((0, 0.011, 0.019))]
    )
    lra, finetune = row(table, "lra"), row(table, "finetune")
    assert lra["J final"] == "**0.610 ± 0.010**" and finetune["J final"] == "0.510 ± 0.010"
    assert (
        lra["runs"] == "3"
        and lra["s train / consolidate / evaluate"] == "3 / 0 / 4"
        and "**" in lra["J listening"]
    )
    assert lra["J intransigence"] == finetune["J intransigence"] == "not run"
    assert "paired t-test" in table and "Fewer than" not in table and "CAUTION" not in table


def test_not_significantly_worse_is_marked_and_less_is_better_is_kept_in_mind():
    values = [{0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.6, 1: 0.55, 2: 0.66}, {0: 0.1, 1: 0.2, 2: 0.3}]
    assert verdicts(values, [True] * 3, False) == (["near", "best", ""], [])
    assert verdicts(values, [True] * 3, True) == (["", "", "best"], [])
    assert verdicts(values, [True, False, True], False) == (["best", "", ""], [])
    assert verdicts([values[0], {0: 0.5, 1: 0.51}], [True] * 2, False) == (["best", ""], [1])
    assert verdicts(values[:1], [True], False) == ([""], [])


def test_two_seeds_are_not_tested_and_that_is_said():
    table = comparison(
        [made(seed=s, shift=0.1) for s in (0, 1)] + [made("finetune", s) for s in (0, 1)]
    )
    assert (
        "†" not in row(table, "finetune")["J final"]
        and "Fewer than 3 seeds in common with the best, so not tested and without a mark: finetune."
        in table
    )


def test_intransigence_is_against_the_joint_run_of_the_same_seed():
    runs = [made(seed=0), made(seed=1), made("joint", 0), made("joint", 1, 0.05)]
    assert [joint_of(r, runs)["seed"] for r in runs[:2]] == [0, 1]
    assert value_of(runs[0], ("J", "intransigence"), runs[2]) == pytest.approx(
        (0.2 + 0.1 + 0.3) / 3
    )
    table = comparison(runs)
    assert (
        row(table, "lra")["J intransigence"] == "0.225 ± 0.035"
        and row(table, "joint")["J intransigence"] == row(table, "joint")["J forgetting"] == "–"
    )
    assert "**" not in row(table, "joint")["J final"]
    assert (
        row(comparison(runs[:3]), "lra")["J intransigence"] == "0.200 (1)"
    )  # one of the two seeds
    other = [TASKS[1], TASKS[0], TASKS[2]]
    assert (
        joint_of(
            runs[0],
            [
                made("joint", 0, tasks=other),
                made("joint", 0, complete=False),
                made("joint", 0, data_root="elsewhere"),
            ],
        )
        is None
    )
    assert joint_of(runs[0], [made("joint", 0, lr=1.0), runs[2]]) is runs[2]  # the nearest config


def test_settings_of_a_method_are_rows_and_protocols_are_tables():
    runs = [
        made(lra_lambda=1.0),
        made(lra_lambda=3.0),
        made("finetune"),
        made(protocol="til"),
        made("frozen", complete=False),
    ]
    found = problems(runs)
    assert [p["title"] for p in found] == ["TIL", "CIL"]
    assert [r["label"] for r in found[1]["rows"]] == [
        "lra",
        "lra lra_lambda=3.0",
        "finetune",
        "frozen",
    ]
    til, cil = comparison(runs).split("### CIL")
    assert (
        set(list(row(til, "finetune").values())[2:])
        == {"not run"}
        == set(list(row(cil, "frozen").values())[2:])
    )
    assert "Left out as unfinished: frozen (1)." in cil and "unfinished" not in til


def test_the_brief_table_has_a_row_a_method_and_the_cells_of_the_long_one():
    runs = (
        [made(seed=s, shift=0.1 + 0.01 * s, protocol=p) for s in range(3) for p in ("til", "cil")]
        + [made("finetune", s, 0.011 * s) for s in range(3)]
        + [made("joint")]
    )
    til, cil = comparison(runs).split("### CIL")
    for method in ("lra", "finetune", "joint"):
        cells = row(brief(runs), method)
        assert list(cells) == [
            "method",
            "TIL: J final",
            "TIL: J forgetting",
            "CIL: J final",
            "CIL: J forgetting",
        ]
        assert [
            cells[f"{p}: J {name}"] for p in ("TIL", "CIL") for name in ("final", "forgetting")
        ] == [row(t, method)[f"J {name}"] for t in (til, cil) for name in ("final", "forgetting")]
    assert brief(runs).splitlines()[-1].startswith("| joint | not run | not run |")
    more = runs + [made(lra_lambda=3.0)]  # a setting stands beside its method
    assert [line.split(" | ")[0] for line in brief(more).splitlines()[2:]] == [
        "| lra",
        "| lra lra_lambda=3.0",
        "| finetune",
        "| joint",
    ]


def test_runs_over_other_classes_or_other_tasks_are_not_compared():
    other = [task | {"classes": [f"x{j}"]} for j, task in enumerate(TASKS)]
    assert [p["title"] for p in problems([made(), made(step=2), made("finetune", step=2)])] == [
        "CIL · step=1",
        "CIL · step=2",
    ]
    assert [p["title"] for p in problems([made(), made(tasks=other, data_root="open")])] == [
        "CIL · data_root=data",
        "CIL · data_root=open",
    ]


def test_what_else_differs_is_said():
    assert "CAUTION: the methods also differ in lr." in comparison(
        [made(), made("finetune", lr=1.0)]
    )
    assert "CAUTION" not in comparison(
        [made(), made("finetune", lra_lambda=2.0, joint_run="x", name="y")]
    )
    assert "another seed" in comparison([made(), made(data_root="other")])
    newer = made("finetune") | {"commit": "f" * 40, "dirty": True}
    assert "Runs of several commits: 01234567 (2), ffffffff with changes (1)." in comparison(
        [made(), made(seed=1), newer]
    ) and "commits" not in comparison([made(), made(seed=1)])


def test_the_same_run_twice_is_an_error():
    with pytest.raises(AtlasError, match="two of the runs are lra, cil, seed 0 on data"):
        comparison([made(), made(name="again")])
    assert [r["label"] for r in rows_of("ewc", [made()])] == ["ewc"] and cell(
        rows_of("ewc", [])[0], ("J", "final"), {}, ""
    ) == "not run"


def results_of(globs):
    """The results in the repository that `python eval.py` finds under these patterns."""
    return [
        read_results(path.parent)
        for pattern in globs.split()
        for path in sorted(ROOT.glob(f"results/{pattern}/results.json"))
    ]


@pytest.mark.parametrize("globs, rows", [
    ("til/* cil/* dil/* tfcl/*", 16), ("open_cil/* open_tfcl/*", 14), ("cil/lra_seed* ablate_cil/*", 8), ("tfcl/lra_seed* ablate_tfcl/*", 6), ("open_cil/lra_open* ablate_open/*", 5),
])  # fmt: skip
def test_the_readmes_tables_are_those_of_the_results_in_the_repository(globs, rows):
    table = brief(results_of(globs))
    assert len(table.splitlines()) == 2 + rows and table in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("group", ["til", "cil", "dil", "tfcl", "open_cil", "open_tfcl"])
def test_the_long_tables_are_too(group):
    assert comparison(results_of(f"{group}/*")) in (ROOT / f"results/{group}.md").read_text()
