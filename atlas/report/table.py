"""Several runs side by side: a Markdown table, a row a method, mean ± standard deviation over seeds, from their results.json alone.

Pure functions on the dicts of results.read_results. A *problem* is what the rows of one table share: protocol, classes and how they are cut into tasks. A *row* is a
method, or a method at one setting where its runs differ in other keys than those below. Within a row runs differ in seed (and data_root) only: (seed, data_root) names a run
there, and pairs it with a run of another row.
"""

import math
from collections import Counter
from statistics import mean, stdev

from atlas.config import Config, as_dict
from atlas.errors import AtlasError
from atlas.metrics import continual_metrics

PROBLEM = (
    "protocol",
    "dataset",
    "image_size",
    "base",
    "step",
    "domains",
    "stream_blur",
    "stream_checkpoints",
)  # runs that differ here are not compared
ELSEWHERE = (
    "name",
    "out_dir",
    "cache_dir",
    "data_root",
    "synth",
    "seed",
    "device",
    "workers",
    "watch",
    "compile",
    "joint_run",
    "first_task",
    "method",
)  # no setting of a method
OWN = (
    "lra_",
    "lora_",
    "strength",
)  # keys that start like this belong to a method: that methods differ in them goes without saying
COLUMNS = [
    (score, name)
    for score in ("J", "F")
    for name in ("final", "incremental", "forgetting", "fwt", "intransigence")
]
COLUMNS.insert(4, ("J", "listening"))
BRIEF = [("J", "final"), ("J", "forgetting")]
LESS_IS_BETTER = ("forgetting", "intransigence")
DEFAULTS = as_dict(Config())
LEVEL, COMMON = 0.05, 3  # of the test; the fewest common seeds it is made with
MARK, NONE, UNDEFINED = "†", "not run", "–"


# ---- which runs belong together --------------------------------------------------------------------------------------


def problems(runs):
    """[results] -> [{"title", "rows": [{"label", "method", "runs": [finished results], "unfinished": int}]}], protocols in their usual order.

    Every method among the runs has a row in every problem, if only an empty one; two finished runs with one config are an error.
    """
    found = {}
    for results in runs:
        key = (
            [results["config"].get(name) for name in PROBLEM],
            sorted({c for task in results["tasks"] for c in task["classes"]}),
        )
        found.setdefault(repr(key), []).append(results)
    methods = sorted(
        dict.fromkeys(results["method"] for results in runs), key=lambda method: method == "joint"
    )  # as given, the upper bound last
    order = ("til", "cil", "dil", "tfcl")
    groups = sorted(
        found.values(),
        key=lambda group: (
            order.index(group[0]["protocol"]) if group[0]["protocol"] in order else len(order)
        ),
    )
    return [
        {
            "title": title(group, groups),
            "rows": [row for method in methods for row in rows_of(method, group)],
        }
        for group in groups
    ]


def title(group, groups):
    """What the runs of a group share: the protocol, and what tells it from the other groups of that protocol."""
    protocol = group[0]["protocol"]
    alike = [other for other in groups if other[0]["protocol"] == protocol]
    differing = [
        name
        for name in PROBLEM[1:]
        if len({repr(other[0]["config"].get(name)) for other in alike}) > 1
    ]
    said = [f"{name}={text(group[0]['config'].get(name))}" for name in differing]
    if len(alike) > 1 and not said:
        said = [f"data_root={text(group[0]['config']['data_root'])}"]
    return " · ".join([protocol.upper(), *said])


def rows_of(method, group):
    """The rows of one method: one for each setting that its runs differ in, named by what in it is not what most runs of the group have."""
    runs = [results for results in group if results["method"] == method]
    if not runs:
        return [{"label": method, "method": method, "runs": [], "unfinished": 0}]
    usual = {
        key: Counter(text(value_in(results, key)) for results in group).most_common(1)[0][0]
        for key in differing_keys(runs)
    }
    rows = {}
    for results in runs:
        setting = {key: text(value_in(results, key)) for key in usual}
        label = " ".join(
            [method, *(f"{key}={value}" for key, value in setting.items() if value != usual[key])]
        )
        row = rows.setdefault(
            label, {"label": label, "method": method, "runs": [], "unfinished": 0}
        )
        if not results["complete"]:
            row["unfinished"] += 1
        elif replicate(results) in map(replicate, row["runs"]):
            raise AtlasError(
                f"two of the runs are {label}, {results['protocol']}, seed {results['seed']} on {results['config']['data_root']}; give one of them"
            )
        else:
            row["runs"].append(results)
    return list(rows.values())


def differing_keys(runs):
    """The config keys, other than ELSEWHERE and PROBLEM, whose values differ among the runs."""
    keys = dict.fromkeys(key for results in runs for key in results["config"])
    return [
        key
        for key in keys
        if key not in (*ELSEWHERE, *PROBLEM)
        and len({repr(value_in(results, key)) for results in runs}) > 1
    ]


def value_in(results, key):
    """Of a config; an older version's runs lack keys."""
    return results["config"].get(key, DEFAULTS.get(key))


def replicate(results):
    """(seed, data_root): what tells the runs of a row apart."""
    return results["seed"], results["config"]["data_root"]


def text(value):
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


# ---- numbers ---------------------------------------------------------------------------------------------------------


def joint_of(results, runs):
    """The finished joint run over the very same tasks, seed and data: the one with the nearest config, or None."""
    fits = [
        r
        for r in runs
        if r["method"] == "joint"
        and r["complete"]
        and replicate(r) == replicate(results)
        and r["tasks"] == results["tasks"]
    ]
    return min(fits, key=lambda r: len(differing_keys([r, results])), default=None)


def value_of(results, column, joint=None):
    """One score of one finished run; None where it is undefined. Intransigence: against `joint` (results), else as the run itself found it."""
    score, name = column
    if name == "listening":
        return results["metrics"]["listening"]
    if name == "intransigence" and joint is not None and results["method"] != "joint":
        return continual_metrics(results["matrix"][score], joint["matrix"][score][-1])[name]
    return results["metrics"][score][name]


def values_of(row, column, runs):
    """{(seed, data_root): value} of a row, without the undefined ones. `runs`: all of the problem, for the joint ones among them."""
    values = {
        replicate(results): value_of(results, column, joint_of(results, runs))
        for results in row["runs"]
    }
    return {key: value for key, value in values.items() if value is not None}


def paired_p(a, b):
    """p of the two-sided paired t-test of the lists a and b (n >= 2): t = mean(d) / (stdev(d) / sqrt(n)), n - 1 degrees of freedom."""
    d = [x - y for x, y in zip(a, b, strict=True)]
    centre, spread = mean(d), stdev(d)
    if spread <= 1e-12 * max(map(abs, d), default=0.0):
        return 1.0 if centre == 0 else 0.0
    return two_sided_t(centre / (spread / math.sqrt(len(d))), len(d) - 1)


def two_sided_t(t, freedom):
    """P(|t'| > |t|) of Student's t with a whole number of degrees of freedom, in closed form (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(
        1 + odd, freedom, 2
    ):  # terms cos^(k-1) or cos^k with their products of fractions
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1.0 - inside))


# ---- the table -------------------------------------------------------------------------------------------------------


def comparison(runs):
    """Markdown: for each problem a heading, a table, and the lines that say how to read it."""
    return "\n\n".join(section(problem) for problem in problems(runs))


def brief(runs):
    """One table for all problems: a row a method (or setting of one), and of each problem final J and forgetting alone."""
    found, told = problems(runs), {}
    methods = list(
        dict.fromkeys(row["method"] for row in found[0]["rows"])
    )  # the same in every problem
    for k, problem in enumerate(found):
        for row, cells in zip(problem["rows"], cells_of(problem, BRIEF)[0]):
            place = methods.index(row["method"]), row["label"]
            told.setdefault(place, [NONE] * len(BRIEF) * len(found))[
                len(BRIEF) * k : len(BRIEF) * (k + 1)
            ] = cells
    head = [
        "method",
        *(f"{problem['title']}: {score} {name}" for problem in found for score, name in BRIEF),
    ]
    rows = [[label, *told[place, label]] for place, label in sorted(told)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def section(problem):
    rows, runs = problem["rows"], [results for row in problem["rows"] for results in row["runs"]]
    cells, untested = cells_of(problem, COLUMNS)
    head = [
        "method",
        "runs",
        *(f"{score} {name}" for score, name in COLUMNS),
        "s train / consolidate / evaluate",
    ]
    lines = [f"### {problem['title']}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        f"| {' | '.join([row['label'], str(len(row['runs'])), *of_row, seconds(row)])} |"
        for row, of_row in zip(rows, cells)
    ]
    return "\n".join(lines + [""] + notes(rows, runs, untested))


def cells_of(problem, columns):
    """([the cells of each row], the labels of rows with too few seeds in common with the best to be tested)."""
    rows, runs = problem["rows"], [results for row in problem["rows"] for results in row["runs"]]
    cells, untested = [[] for _ in rows], set()
    for column in columns:
        values = [values_of(row, column, runs) for row in rows]
        marks, few = verdicts(
            values, [row["method"] != "joint" for row in rows], column[1] in LESS_IS_BETTER
        )
        untested |= {rows[i]["label"] for i in few}
        for row, own, of_row, mark in zip(rows, cells, values, marks):
            own.append(cell(row, column, of_row, mark))
    return cells, untested


def verdicts(values, competes, less_is_better):
    """One column: ([one of "best", "near", "" a row], the rows that had too few seeds in common with the best to be tested). `values`: of values_of, a row each."""
    means = [mean(v.values()) if v and c else None for v, c in zip(values, competes)]
    known = [m for m in means if m is not None]
    if len(known) < 2:
        return [""] * len(values), []
    best = means.index(min(known) if less_is_better else max(known))
    found, few = [""] * len(values), []
    for i, m in enumerate(means):
        common = sorted(values[i].keys() & values[best].keys())
        if m == means[best]:
            found[i] = "best"
        elif m is not None and len(common) < COMMON:
            few.append(i)
        elif (
            m is not None
            and paired_p(*([values[k][key] for key in common] for k in (best, i))) >= LEVEL
        ):
            found[i] = "near"
    return found, few


def cell(row, column, values, verdict):
    """Mean ± standard deviation over the row's runs; fewer runs than the row has are counted in brackets."""
    if not row["runs"] or (
        column[1] == "intransigence" and not values and row["method"] != "joint"
    ):
        return NONE
    if not values:
        return UNDEFINED
    said = spread_text(list(values.values())) + (
        f" ({len(values)})" if len(values) < len(row["runs"]) else ""
    )
    return {"best": f"**{said}**", "near": f"{said} {MARK}", "": said}[verdict]


def spread_text(values):
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def seconds(row):
    parts = ("train", "consolidate", "evaluate")
    return (
        " / ".join(
            f"{mean(sum(results['seconds'][part]) for results in row['runs']):.0f}"
            for part in parts
        )
        if row["runs"]
        else NONE
    )


def notes(rows, runs, untested):
    """The lines under a table: how to read it, and what to be careful with."""
    lines = [f"Mean ± standard deviation over seeds. Forgetting and intransigence: less is better. **Bold**: the best, joint apart; {MARK}: not significantly worse "
             f"than the best (two-sided paired t-test over common seeds, p ≥ {LEVEL}, uncorrected)."]  # fmt: skip
    if untested:
        lines.append(
            f"Fewer than {COMMON} seeds in common with the best, so not tested and without a mark: {', '.join(r['label'] for r in rows if r['label'] in untested)}."
        )
    unfinished = [f"{row['label']} ({row['unfinished']})" for row in rows if row["unfinished"]]
    if unfinished:
        lines.append(f"Left out as unfinished: {', '.join(unfinished)}.")
    if len({results["config"]["data_root"] for results in runs}) > 1:
        lines.append(
            "The runs are over several data_root; a seed on another one counts as another seed."
        )
    own = {
        key
        for method in {row["method"] for row in rows}
        for key in differing_keys([r for r in runs if r["method"] == method])
    }
    others = [key for key in differing_keys(runs) if key not in own and not key.startswith(OWN)]
    if others:
        lines.append(f"CAUTION: the methods also differ in {', '.join(others)}.")
    machines = sorted(
        {
            f"{results['environment']['device']} ({results['environment']['threads']} threads)"
            for results in runs
        }
    )
    if machines:
        lines.append(f"Seconds on {' and '.join(machines)}.")
    commits = Counter(
        f"{(results['commit'] or 'unknown')[:8]}{' with changes' if results['dirty'] else ''}"
        for results in runs
    )
    if len(commits) > 1:
        lines.append(
            f"Runs of several commits: {', '.join(f'{commit} ({count})' for commit, count in commits.most_common())}."
        )
    return ["  \n".join(lines)]
