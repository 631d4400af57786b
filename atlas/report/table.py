"""Several runs side by side: Markdown tables, mean ± standard deviation over seeds.

A *problem* is what the rows of one table share: protocol, classes, and how they are cut into tasks.
A *row* is a method, or one setting of it. The runs of a row differ in seed and data_root only;
(seed, data_root) names a run there, and pairs it with a run of another row.
"""

import json
from collections import Counter
from statistics import mean, stdev

from atlas.config import Config, as_dict
from atlas.errors import AtlasError
from atlas.methods import METHODS
from atlas.report.packed import PLACES
from atlas.results import mean_known

# Runs that differ in one of these keys are not compared.
PROBLEM = ("protocol", "dataset", "image_size", "base", "step", "domains")
PROBLEM += ("stream_blur", "stream_checkpoints")
# These keys are no setting of a method; an older version wrote `watch`.
ELSEWHERE = (*PROBLEM, *PLACES, "method", "seed", "data_root", "synth", "compile", "watch")
OWN = (
    "lra_",
    "lora_",
    "strength",
)  # keys of single methods: that methods differ in them is no news
NAMES = ("final", "incremental", "forgetting", "fwt", "listening", "intransigence")
COLUMNS = [("val J", "final"), *(("J", name) for name in NAMES)]
COLUMNS += [("F", name) for name in NAMES if name != "listening"]
BRIEF = [("J", "final"), ("J", "forgetting")]
LESS_IS_BETTER = ("forgetting", "intransigence")
DEFAULTS = as_dict(Config())
LEVEL = 0.05  # of the test
COMMON = 3  # the fewest common seeds it is made with
MARK, NONE, UNDEFINED = "†", "not run", "–"


def problems(runs):
    """[{"title", "rows": [{"label", "method", "runs": [finished results], "unfinished": int}]}].

    Each method among the runs has a row in every problem, if only an empty one.
    """
    groups = {}
    for results in runs:
        setting = [results["config"].get(name) for name in PROBLEM]
        classes = sorted({name for task in results["tasks"] for name in task["classes"]})
        groups.setdefault(repr((setting, classes)), []).append(results)
    groups = sorted(groups.values(), key=lambda g: "til cil dil tfcl".find(g[0]["protocol"]))
    methods = list(dict.fromkeys(results["method"] for results in runs))
    methods.sort(key=lambda method: method == "joint")  # as given, but the upper bound last
    found = []
    for group in groups:
        rows = sum((rows_of(method, group) for method in methods), [])
        found.append({"title": title(group, groups), "rows": rows})
    return found


def title(group, groups):
    """The protocol, and what tells this group from the other groups of the protocol."""
    first = group[0]["config"]
    alike = [g[0]["config"] for g in groups if g[0]["protocol"] == group[0]["protocol"]]
    said = []
    for name in PROBLEM[1:]:
        if len({repr(config.get(name)) for config in alike}) > 1:
            said.append(f"{name}={text(first.get(name))}")
    if len(alike) > 1 and not said:
        said = [f"data_root={first['data_root']}"]
    return " · ".join([group[0]["protocol"].upper(), *said])


def rows_of(method, group):
    """The rows of one method, one a setting, named by what is not as in most runs of the group.

    A run that is given twice counts once; two different runs of one config are an error.
    """
    runs = [results for results in group if results["method"] == method]
    usual = {}
    for key in differing_keys(runs):
        values = Counter(text(value_in(results, key)) for results in group)
        usual[key] = values.most_common(1)[0][0]
    rows = {}
    for results in runs:
        setting = {key: text(value_in(results, key)) for key in usual}
        said = [f"{key}={value}" for key, value in setting.items() if value != usual[key]]
        label = " ".join([method, *said])
        row = rows.setdefault(label, empty_row(label, method))
        twins = [other for other in row["runs"] if replicate(other) == replicate(results)]
        if not results["complete"]:
            row["unfinished"] += 1
        elif not twins:
            row["runs"].append(results)
        elif twins[0]["matrix"] != results["matrix"]:
            raise AtlasError(
                f"two of the runs are {label}, {results['protocol']}, seed {results['seed']} on "
                f"{results['config']['data_root']}; give one of them"
            )
    return list(rows.values()) or [empty_row(method, method)]


def empty_row(label, method):
    return {"label": label, "method": method, "runs": [], "unfinished": 0}


def differing_keys(runs):
    """The config keys of settings whose values differ among the runs."""
    found = []
    for key in dict.fromkeys(key for results in runs for key in results["config"]):
        known = [r for r in runs if key in r["config"] or key in DEFAULTS]  # versions differ
        if key not in ELSEWHERE and len({text(value_in(r, key)) for r in known}) > 1:
            found.append(key)
    return found


def value_in(results, key):
    """The value of a key in a run; a null strength or rate stands for the method's own default."""
    config = results["config"]
    value = config.get(key, DEFAULTS.get(key))
    if value is None and key in ("strength", "lr") and results["method"] in METHODS:
        value = getattr(METHODS[results["method"]], key)
    return config.get("lr_first") if value is None and key == "lr" else value


def replicate(results):
    return results["seed"], results["config"]["data_root"]


def text(value):
    return json.dumps(value, ensure_ascii=False).strip('"')


def joint_of(results, runs):
    """The joint run over the same tasks, seed and data with the nearest config, or None."""
    fits = [run for run in runs if run["method"] == "joint" and run["complete"]]
    fits = [run for run in fits if replicate(run) == replicate(results)]
    fits = [run for run in fits if run["tasks"] == results["tasks"]]
    return min(fits, key=lambda run: len(differing_keys([run, results])), default=None)


def value_of(results, column, runs):
    """One score of a finished run, or None; intransigence against the joint run among `runs`."""
    score, name = column
    if score == "val J":
        return mean_known(results["val_matrix"]["J"][-1])
    if name == "listening":
        return results["metrics"]["listening"]
    joint = joint_of(results, runs) if name == "intransigence" else None
    if joint is None or results["method"] == "joint":
        return results["metrics"][score][name]
    rows, best = results["matrix"][score][1:], joint["matrix"][score][-1]
    if None in [*rows, best]:
        return None
    pairs = [(best[j], rows[j][j]) for j in range(len(best))]
    return mean_known([None if None in pair else pair[0] - pair[1] for pair in pairs])


def values_of(row, column, runs):
    """{(seed, data_root): value} of a row, without the undefined. `runs`: all of the problem."""
    values = {replicate(results): value_of(results, column, runs) for results in row["runs"]}
    return {key: value for key, value in values.items() if value is not None}


def paired_p(a, b):
    """p of the two-sided paired t-test of the lists a and b."""
    from scipy.stats import ttest_rel  # it takes a second to load

    d = [x - y for x, y in zip(a, b, strict=True)]
    if stdev(d) <= 1e-12 * max(map(abs, d)):  # all differences are equal: t would be 0 / 0
        return 1.0 if mean(d) == 0 else 0.0
    return float(ttest_rel(a, b).pvalue)


def comparison(runs):
    """Markdown: for each problem a heading, a table, and the lines that say how to read it."""
    return "\n\n".join(section(problem) for problem in problems(runs))


def brief(runs):
    """One table of all problems, of each final J and forgetting alone."""
    found, head, told = problems(runs), ["method"], {}
    methods = [row["method"] for row in found[0]["rows"]]
    for k, problem in enumerate(found):
        head += [f"{problem['title']}: {score} {name}" for score, name in BRIEF]
        for row, cells in zip(problem["rows"], cells_of(problem["rows"], BRIEF)):
            place = methods.index(row["method"]), row["label"]
            told.setdefault(place, [[NONE] * len(BRIEF)] * len(found))[k] = cells
    rows = [[label, *sum(told[place, label], [])] for place, label in sorted(told)]
    return markdown(head, rows)


def markdown(head, rows):
    lines = [" | ".join(cells) for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def section(problem):
    rows = sorted(problem["rows"], key=rank)
    head = ["method", "runs", *(f"{score} {name}" for score, name in COLUMNS)]
    head.append("s train / consolidate / evaluate")
    lines = []
    for row, cells in zip(rows, cells_of(rows, COLUMNS)):
        lines.append([row["label"], str(len(row["runs"])), *cells, seconds(row)])
    under = "  \n".join(notes(rows))
    return f"### {problem['title']}\n\n{markdown(head, lines)}\n\n{under}"


def rank(row):
    values = values_of(row, COLUMNS[0], ())
    return row["method"] == "joint", -mean(values.values()) if values else 0.0


def cells_of(rows, columns):
    """The cells of each row."""
    runs = [results for row in rows for results in row["runs"]]
    competes = [row["method"] != "joint" for row in rows]
    cells = [[] for _ in rows]
    for column in columns:
        values = [values_of(row, column, runs) for row in rows]
        marks = verdicts(values, competes, column[1] in LESS_IS_BETTER)
        for row, own, of_row, mark in zip(rows, cells, values, marks):
            own.append(cell(row, column, of_row, mark))
    return cells


def verdicts(values, competes, less_is_better):
    """ "best", "near" (not shown to be worse than the best) or "" for each row of one column.

    values: of values_of, for each row. A row with too few seeds in common with the best gets none.
    """
    means = {i: mean(v.values()) for i, v in enumerate(values) if v and competes[i]}
    found = [""] * len(values)
    if len(means) < 2:
        return found
    best = (min if less_is_better else max)(means, key=means.get)
    for i, m in means.items():
        common = sorted(values[i].keys() & values[best].keys())
        if m == means[best]:
            found[i] = "best"
        elif len(common) >= COMMON:
            pair = [[values[k][key] for key in common] for k in (best, i)]
            found[i] = "near" if paired_p(*pair) >= LEVEL else ""
    return found


def cell(row, column, values, verdict):
    """Mean ± deviation over the runs; in brackets of how many, where not of all of the row."""
    if not row["runs"] or not values and column[1] == "intransigence" and row["method"] != "joint":
        return NONE
    if not values:
        return UNDEFINED
    found = list(values.values())
    said = f"{mean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")
    if len(found) < len(row["runs"]):
        said += f" ({len(found)})"
    return {"best": f"**{said}**", "near": f"{said} {MARK}", "": said}[verdict]


def seconds(row):
    if not row["runs"]:
        return NONE
    parts = []
    for part in ("train", "consolidate", "evaluate"):
        parts.append(mean(sum(results["seconds"][part]) for results in row["runs"]))
    return " / ".join(f"{part:.0f}" for part in parts)


def notes(rows):
    """The lines under a table: how to read it, and what to be careful with."""
    runs = [results for row in rows for results in row["runs"]]
    lines = [
        "Mean ± standard deviation over seeds, ranked by final J on validation clips (val J). Of "
        "forgetting and intransigence, less is better. **Bold**: the best, joint apart. "
        f"{MARK}: not shown to be worse than the best (paired t-test over common seeds, "
        f"p ≥ {LEVEL}, two-sided, uncorrected); not tested with fewer than {COMMON} of them."
    ]
    unfinished = [f"{row['label']} ({row['unfinished']})" for row in rows if row["unfinished"]]
    if unfinished:
        lines.append(f"Left out as unfinished: {', '.join(unfinished)}.")
    own = set()
    for method in {row["method"] for row in rows}:
        own |= set(differing_keys([r for r in runs if r["method"] == method]))
    others = [key for key in differing_keys(runs) if key not in own and not key.startswith(OWN)]
    if others:
        lines.append(f"CAUTION: the methods also differ in {', '.join(others)}.")
    environments = [results["environment"] for results in runs]
    machines = sorted({f"{e['device']} ({e['threads']} threads)" for e in environments})
    if machines:
        lines.append(f"Seconds on {' and '.join(machines)}.")
    commits = Counter(
        (r["commit"] or "unknown")[:8] + (" with changes" if r["dirty"] else "") for r in runs
    )
    if len(commits) > 1:
        said = ", ".join(f"{commit} ({count})" for commit, count in commits.most_common())
        lines.append(f"Runs of several commits: {said}.")
    return lines
