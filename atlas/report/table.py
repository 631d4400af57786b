"""Several runs side by side: Markdown tables, mean ± standard deviation over seeds.

A *problem* is what the rows of one table share: protocol, classes, and how they are cut into tasks.
A *row* is a method, or one setting of it; its runs differ in their replicate (seed, data_root).
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
ELSEWHERE += ("full_scores",)
OWN = ("lra_", "lora_", "strength")  # of single methods: that methods differ in them is no news
SCORES = [("val J", "final"), *(("J", name) for name in ("final", "learning", "forgetting"))]
SCORES += [("J", "listening"), ("J", "intransigence"), ("J_source", "final"), ("J_drawn", "final")]
SCORES += [("F", "final")]
BRIEF = [("J", "final"), ("J", "forgetting"), ("J", "listening")]
LESS_IS_BETTER = ("forgetting", "intransigence")
DEFAULTS = as_dict(Config())
COMMON = 3  # the fewest common seeds that are tested
NONE, UNDEFINED = "not run", "–"
UNDER = (
    "Mean ± standard deviation over seeds, ranked by final J on validation clips (val J). Of "
    "forgetting and intransigence, less is better. **Bold**: the best, joint apart. "
    "Δ: in final J, over common seeds; p of a paired t-test, two-sided, by Holm's correction for "
    f"all rows of the table; not tested with fewer than {COMMON} seeds."
)


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
        usual[key] = Counter(value_in(r, key) for r in group).most_common(1)[0][0]
    rows = {}
    for results in runs:
        setting = {key: value_in(results, key) for key in usual}
        said = [f"{key}={value}" for key, value in setting.items() if value != usual[key]]
        row = new_row(" ".join([method, *said]), method)
        row = rows.setdefault(row["label"], row)
        twins = [other for other in row["runs"] if replicate(other) == replicate(results)]
        if not results["complete"]:
            row["unfinished"] += 1
        elif not twins:
            row["runs"].append(results)
        elif twins[0]["matrix"] != results["matrix"]:
            raise AtlasError(
                f"two of the runs are {row['label']}, {results['protocol']}, seed "
                f"{results['seed']} on {results['config']['data_root']}; give one of them"
            )
    return list(rows.values()) or [new_row(method, method)]


def new_row(label, method):
    return {"label": label, "method": method, "runs": [], "unfinished": 0}


def differing_keys(runs):
    """The config keys of settings whose values differ among the runs."""
    found = []
    for key in dict.fromkeys(key for results in runs for key in results["config"]):
        known = [r for r in runs if key in r["config"] or key in DEFAULTS]  # versions differ
        if key not in ELSEWHERE and len({value_in(r, key) for r in known}) > 1:
            found.append(key)
    return found


def value_in(results, key):
    """A key's value, as text; a null strength or rate stands for the method's own default."""
    config = results["config"]
    value = config.get(key, DEFAULTS.get(key))
    if value is None and key in ("strength", "lr") and results["method"] in METHODS:
        value = getattr(METHODS[results["method"]], key)
    return text(config.get("lr_first") if value is None and key == "lr" else value)


def replicate(results):
    return results["seed"], results["config"]["data_root"]


def text(value):
    return json.dumps(value, ensure_ascii=False).strip('"')


def joint_of(results, runs):
    """The joint run over the same tasks, seed and data with the nearest config, or None."""
    fits = [run for run in runs if run["method"] == "joint" and run["complete"]]
    own = (replicate(results), results["tasks"])
    fits = [run for run in fits if (replicate(run), run["tasks"]) == own]
    return min(fits, key=lambda run: len(differing_keys([run, results])), default=None)


def value_of(results, column, runs):
    """One score of a finished run, or None; intransigence against the joint run among `runs`."""
    score, name = column
    if score == "val J":
        return mean_known(results["val_matrix"]["J"][-1])
    if name == "listening":
        return results["metrics"]["listening"]
    if score in ("J_source", "J_drawn"):
        return results["metrics"].get(score)  # an older version had none
    joint = joint_of(results, runs) if name == "intransigence" else None
    if joint is None or results["method"] == "joint":
        return results["metrics"][score][name]
    rows, best = results["matrix"][score][1:], joint["matrix"][score][-1]
    if None in [*rows, best]:
        return None
    pairs = [(best[j], rows[j][j]) for j in range(len(best))]
    return mean_known([None if None in pair else pair[0] - pair[1] for pair in pairs])


def values_of(row, column, runs=()):
    """{replicate: value} of a row, without the undefined. `runs`: all of the problem."""
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
    """One table of all problems: final J, its gain, forgetting and listening."""
    found, head, told = problems(runs), ["method"], {}
    methods = [row["method"] for row in found[0]["rows"]]
    for k, problem in enumerate(found):
        columns = [f"{score} {name}" for score, name in BRIEF]
        rows = problem["rows"]
        base, gained = gains(rows)
        columns.insert(1, f"Δ to {base}")
        head += [f"{problem['title']}: {column}" for column in columns]
        for row, cells, gain in zip(rows, cells_of(rows, BRIEF), gained):
            place = methods.index(row["method"]), row["label"]
            cells.insert(1, gain)
            told.setdefault(place, [[NONE] * len(columns)] * len(found))[k] = cells
    return markdown(head, [[label, *sum(told[place, label], [])] for place, label in sorted(told)])


def by_class(runs):
    """For each problem a table of final J on the test clips of each class, hardest class first."""
    told = []
    for problem in problems(runs):
        rows = [row for row in problem["rows"] if row["runs"]]
        found = [class_scores(row) for row in rows]
        level = {}  # of a class: its mean in each row
        for scores in found:
            for name, values in scores.items():
                level.setdefault(name, []).append(mean(values))
        lines = []
        for name in sorted(level, key=lambda name: mean(level[name])):
            lines.append([name, *(spread(f[name]) if name in f else UNDEFINED for f in found)])
        table = markdown(["class", *(row["label"] for row in rows)], lines)
        told.append(f"### {problem['title']}\n\n{table}")
    return "\n\n".join(told)


def class_scores(row):
    """{class: [final J of each run]}, without the undefined."""
    found = {}
    for results in row["runs"]:
        matrix = results.get("class_matrix") or {"classes": [], "J": [[]]}  # of a stream None
        for name, value in zip(matrix["classes"], matrix["J"][-1]):
            if value is not None:
                found.setdefault(name, []).append(value)
    return found


def markdown(head, rows):
    lines = [" | ".join(cells) for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def section(problem):
    def rank(row):
        values = values_of(row, SCORES[0]).values()
        return row["method"] == "joint", -mean(values) if values else 0.0

    rows = sorted(problem["rows"], key=rank)
    told = [c for c in SCORES if "J" in c[0][-1] or any(values_of(row, c) for row in rows)]
    head = ["method", "runs", *(f"{score} {name}" for score, name in told)]
    base, gained = gains(rows)
    head += [f"Δ to {base}", "MB kept", "s train / consolidate / evaluate"]
    lines = []
    for row, cells, gain in zip(rows, cells_of(rows, told), gained):
        counted = [row["label"], str(len(row["runs"]))]
        lines.append([*counted, *cells, gain, memory(row), seconds(row)])
    under = "  \n".join([UNDER, *notes(rows)])
    return f"### {problem['title']}\n\n{markdown(head, lines)}\n\n{under}"


def cells_of(rows, columns):
    """The cells of each row; the best of a column, `joint` apart, is bold."""
    runs = [results for row in rows for results in row["runs"]]
    cells = [[] for _ in rows]
    for column in columns:
        values = [values_of(row, column, runs) for row in rows]
        means = [mean(v.values()) for v, r in zip(values, rows) if v and r["method"] != "joint"]
        best = (min if column[1] in LESS_IS_BETTER else max)(means, default=None)
        for row, own, of_row in zip(rows, cells, values):
            said = cell(row, column, of_row)
            wins = len(means) > 1 and row["method"] != "joint" and of_row
            own.append(f"**{said}**" if wins and mean(of_row.values()) == best else said)
    return cells


def gains(rows):
    """(name, [the gain of each row on the row of that name in final J, and p]).

    The row is finetune's, the one that validation clips prefer; else a method with nothing changed.
    """
    values = [values_of(row, BRIEF[0]) for row in rows]
    plain = [k for k, row in enumerate(rows) if row["label"] == row["method"]]
    base = [k for k, row in enumerate(rows) if row["method"] == "finetune" and values[k]]
    preferred = [mean(values_of(row, SCORES[0]).values() or [0]) for row in rows]
    base = max(base or plain or [0], key=preferred.__getitem__)
    found, p = {}, {}
    for k, row in enumerate(rows):
        common = sorted(values[k].keys() & values[base].keys())
        if k == base or not common:
            continue
        own, other = ([values[i][key] for key in common] for i in (k, base))
        found[k] = mean(own) - mean(other)
        if len(common) >= COMMON and row["method"] != "joint":
            p[k] = paired_p(own, other)
    p = holm(p)
    told = []
    for k in range(len(rows)):
        said = f" (p {p[k]:.3f})" if k in p else ""
        empty = UNDEFINED if rows[k]["runs"] else NONE
        told.append(f"{found[k]:+.3f}{said}" if k in found else empty)
    return rows[base]["method"], told


def holm(p):
    """{name: p} corrected for the number of tests (Holm 1979): p_(k) (m - k + 1), never falling."""
    corrected, least = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.get)):
        least = max(least, min(1.0, p[name] * (len(p) - k)))
        corrected[name] = least
    return corrected


def cell(row, column, values):
    """Mean ± deviation over the runs; in brackets of how many, where not of all of the row."""
    if not values:
        no_joint = column[1] == "intransigence" and row["method"] != "joint"
        return NONE if no_joint or not row["runs"] else UNDEFINED
    counted = f" ({len(values)})" if len(values) < len(row["runs"]) else ""
    return spread(list(values.values())) + counted


def spread(found):
    return f"{mean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")


def memory(row):
    """What the method keeps beside the model, at most over the runs."""
    kept = [results.get("method_memory_bytes") for results in row["runs"]]
    kept = [value for value in kept if value is not None]
    empty = UNDEFINED if row["runs"] else NONE
    return f"{max(kept) / 1e6:.1f}" if kept else empty


def seconds(row):
    if not row["runs"]:
        return NONE
    spent = [results["seconds"] for results in row["runs"]]
    parts = ("train", "consolidate", "evaluate")
    return " / ".join(f"{mean(sum(times[part]) for times in spent):.0f}" for part in parts)


def notes(rows):
    """What to be careful with in a table, line by line."""
    runs = [results for row in rows for results in row["runs"]]
    lines = []
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
