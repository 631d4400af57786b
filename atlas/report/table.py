"""Several runs side by side: Markdown tables, mean ± standard deviation over seeds.

The runs of one *problem* are compared: protocol, classes, and how they are cut into tasks. A *row*
is a method, or one setting of it; its runs differ in their replicate (seed, data_root)."""

import itertools
import json
from collections import Counter
from statistics import mean, stdev

from atlas.config import Config, as_dict
from atlas.errors import AtlasError
from atlas.methods import METHODS
from atlas.report.packed import PLACES
from atlas.results import mean_known

PROBLEM = "protocol dataset image_size base step domains stream_blur stream_checkpoints".split()
# These keys are no setting of a method; an older version wrote `watch`.
ELSEWHERE = "method seed data_root synth compile watch full_scores".split() + [*PROBLEM, *PLACES]
OWN = ("lra_", "lora_", "strength")  # of single methods: that methods differ in them is no news
VAL, FINAL, GAIN = "val J final", "J final", "Δ to "
ALWAYS = [VAL, FINAL, "J learning", "J forgetting", "J listening", "J intransigence"]
SCORES = [*ALWAYS, "J_source final", "J_drawn final", "F final"]
BRIEF = [FINAL, GAIN, "J forgetting", "J listening"]
LESS_IS_BETTER = ("J forgetting", "J intransigence")
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
    """[{"title", "rows": [{"label", "method", "runs": [finished results], "unfinished": int,
    "scores": {column: {replicate: value}}}]}]. Each method has a row in every problem, if only an
    empty one."""
    groups = {}
    for results in runs:
        setting = [results["config"].get(key) for key in PROBLEM]
        classes = sorted({name for task in results["tasks"] for name in task["classes"]})
        groups.setdefault(repr((setting, classes)), []).append(results)
    groups = sorted(groups.values(), key=lambda g: "til cil dil tfcl".find(g[0]["protocol"]))
    methods = list(dict.fromkeys(results["method"] for results in runs))
    methods.sort(key=lambda method: method == "joint")  # as given, but the upper bound last
    found = []
    for group in groups:
        rows = sum((rows_of(method, group) for method in methods), [])
        found.append({"title": title(group[0], groups), "rows": rows})
    return found


def title(first, groups):
    """The protocol, and what tells the group of `first` from the others of its protocol."""
    alike = [g[0]["config"] for g in groups if g[0]["protocol"] == first["protocol"]]
    differ = [key for key in PROBLEM if len({repr(config.get(key)) for config in alike}) > 1]
    differ = differ or ["data_root"] * (len(alike) > 1)
    said = [f"{key}={text(first['config'].get(key))}" for key in differ]
    return " · ".join([first["protocol"].upper(), *said])


def rows_of(method, group):
    """The rows of one method, one a setting, named by what is not as in most runs of the group.

    A run that is given twice counts once; two different runs of one config are an error.
    """
    empty = {"label": method, "method": method, "runs": [], "unfinished": 0, "scores": {}}
    runs = [results for results in group if results["method"] == method]
    usual, rows = {}, {}
    for key in differing_keys(runs):
        usual[key] = Counter(value_in(r, key) for r in group).most_common(1)[0][0]
    for results in runs:
        own = {key: value_in(results, key) for key in usual}
        said = [f"{key}={value}" for key, value in own.items() if value != usual[key]]
        label = " ".join([method, *said])
        row = rows.setdefault(label, empty | {"label": label, "runs": [], "scores": {}})
        twins = [other for other in row["runs"] if replicate(other) == replicate(results)]
        if not results["complete"]:
            row["unfinished"] += 1
        elif not twins:
            row["runs"].append(results)
            for column, value in scores_of(results, joint_of(results, group)).items():
                if value is not None:
                    row["scores"].setdefault(column, {})[replicate(results)] = value
        elif twins[0]["matrix"] != results["matrix"]:
            where = f"seed {results['seed']} on {results['config']['data_root']}"
            said = f"two of the runs are {label}, {results['protocol']}, {where}; give one of them"
            raise AtlasError(said)
    return list(rows.values()) or [empty]


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
    fits = [run for run in fits if replicate(run) == replicate(results)]
    fits = [run for run in fits if run["tasks"] == results["tasks"]]
    return min(fits, key=lambda run: len(differing_keys([run, results])), default=None)


def scores_of(results, joint):
    """{column: score or None} of a finished run; intransigence against `joint`, if there is one."""
    metrics = results["metrics"]
    found = {f"J {name}": value for name, value in metrics["J"].items()}
    if joint and results["method"] != "joint":
        rows, best = results["matrix"]["J"][1:], joint["matrix"]["J"][-1]
        scored = [] if None in [*rows, best] else [(x, rows[j][j]) for j, x in enumerate(best)]
        found["J intransigence"] = mean_known([x - y for x, y in scored if None not in (x, y)])
    found |= {"J listening": metrics["listening"], "F final": metrics["F"]["final"]}
    found |= {f"{name} final": metrics.get(name) for name in ("J_source", "J_drawn")}
    return found | {VAL: mean_known(results["val_matrix"]["J"][-1])}


def paired_p(a, b):
    """p of the two-sided paired t-test of the lists a and b."""
    from scipy.stats import ttest_rel  # it takes a second to load

    d = [x - y for x, y in zip(a, b, strict=True)]
    if stdev(d) <= 1e-12 * max(map(abs, d)):  # all differences are equal: t would be 0 / 0
        return 1.0 if mean(d) == 0 else 0.0
    return float(ttest_rel(a, b).pvalue)


def preferred(row):
    """How validation clips rate a row."""
    return mean(row["scores"].get(VAL, {0: 0}).values())


def comparison(runs):
    """Markdown: for each problem a heading, a table, and the lines that say how to read it."""
    said = []
    for problem in problems(runs):
        rows = sorted(problem["rows"], key=lambda row: (row["method"] == "joint", -preferred(row)))
        known = {*ALWAYS, *(column for row in rows for column in row["scores"])}
        told = [column for column in SCORES if column in known]
        head, cells = filled(rows, [*told, GAIN, *COSTS])
        lines = [[row["label"], str(len(row["runs"])), *own] for row, own in zip(rows, cells)]
        table = markdown(["method", "runs", *head], lines)
        said.append(f"### {problem['title']}\n\n{table}\n\n" + "  \n".join([UNDER, *notes(rows)]))
    return "\n\n".join(said)


def brief(runs):
    """One table of all problems: final J, its gain, forgetting and listening."""
    found, head, told = problems(runs), ["method"], {}
    methods = [row["method"] for row in found[0]["rows"]]
    for k, problem in enumerate(found):
        columns, lines = filled(problem["rows"], BRIEF)
        head += [f"{problem['title']}: {column}" for column in columns]
        for row, cells in zip(problem["rows"], lines):
            place = methods.index(row["method"]), row["label"]
            told.setdefault(place, [[NONE] * len(BRIEF)] * len(found))[k] = cells
    return markdown(head, [[label, *sum(told[place, label], [])] for place, label in sorted(told)])


def by_class(runs):
    """For each problem a table of final J on the test clips of each class, hardest class first."""
    told = []
    for problem in problems(runs):
        labels = [row["label"] for row in problem["rows"] if row["runs"]]
        found = {}  # {class: {label: [final J of each run]}}
        for row in problem["rows"]:
            for results in row["runs"]:
                matrix = results.get("class_matrix") or {"classes": [], "J": [[]]}
                for name, value in zip(matrix["classes"], matrix["J"][-1]):
                    if value is not None:
                        found.setdefault(name, {}).setdefault(row["label"], []).append(value)
        level = {name: mean(map(mean, values.values())) for name, values in found.items()}
        lines = []
        for name in sorted(level, key=level.get):
            lines.append([name, *(spread(found[name].get(label)) for label in labels)])
        told.append(f"### {problem['title']}\n\n{markdown(['class', *labels], lines)}")
    return "\n\n".join(told)


def markdown(head, rows):
    lines = [" | ".join(cells) for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def filled(rows, columns):
    """([the heading of each column], [[the cell in each column] of each row])."""
    head, told = list(columns), []
    for k, column in enumerate(columns):
        if column == GAIN:
            base, cells = gains(rows)
            head[k] += base
        else:
            cells = list(map(COSTS[column], rows)) if column in COSTS else cells_of(rows, column)
        told.append(cells)
    return head, list(map(list, zip(*told)))


def cells_of(rows, column):
    """The cells of a column of scores; the best, `joint` apart, is bold."""
    values = [list(row["scores"].get(column, {}).values()) for row in rows]
    means = [
        mean(own) if own and row["method"] != "joint" else None for row, own in zip(rows, values)
    ]
    known = [value for value in means if value is not None]
    best = (min if column in LESS_IS_BETTER else max)(known, default=None)
    cells = [cell(row, column, own) for row, own in zip(rows, values)]
    bold = [len(known) > 1 and value == best for value in means]
    return [f"**{said}**" if wins else said for said, wins in zip(cells, bold)]


def gains(rows):
    """(name, [the gain of each row on the row of that name in final J, and p]).

    The row is finetune's, the one that validation clips prefer; else a method with nothing changed.
    """
    finals = {row["label"]: row["scores"].get(FINAL, {}) for row in rows}
    plain = [row for row in rows if row["label"] == row["method"]]
    tuned = [row for row in rows if row["method"] == "finetune" and finals[row["label"]]]
    base = max(tuned or plain or rows[:1], key=preferred)
    known, found, p = finals[base["label"]], {}, {}
    for row in rows:
        label, values = row["label"], finals[row["label"]]
        common = sorted(values.keys() & known.keys())
        if row is base or not common:
            continue
        own, other = ([scores[key] for key in common] for scores in (values, known))
        found[label] = f"{mean(own) - mean(other):+.3f}"
        if len(common) >= COMMON and row["method"] != "joint":
            p[label] = paired_p(own, other)
    for label, value in holm(p).items():
        found[label] += f" (p {value:.3f})"
    return base["method"], [found.get(row["label"], empty(row)) for row in rows]


def holm(p):
    """{name: p} corrected for the number of tests (Holm 1979): p_(k) (m - k + 1), never falling."""
    names = sorted(p, key=p.get)
    raised = [min(1.0, p[name] * (len(p) - k)) for k, name in enumerate(names)]
    return dict(zip(names, itertools.accumulate(raised, max)))


def empty(row):
    return UNDEFINED if row["runs"] else NONE


def cell(row, column, values):
    """Mean ± deviation over the runs; in brackets of how many, where not of all of the row."""
    if not values:
        no_joint = column == "J intransigence" and row["method"] != "joint"
        return NONE if no_joint else empty(row)
    return spread(values) + (f" ({len(values)})" if len(values) < len(row["runs"]) else "")


def spread(values):
    if not values:
        return UNDEFINED
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def memory(row):
    """What the method keeps beside the model, at most over the runs."""
    kept = [results.get("method_memory_bytes") for results in row["runs"]]
    most = max((value for value in kept if value is not None), default=None)
    return empty(row) if most is None else f"{most / 1e6:.1f}"


def seconds(row):
    parts = ("train", "consolidate", "evaluate")
    spent = [[sum(results["seconds"][part]) for part in parts] for results in row["runs"]]
    return " / ".join(f"{mean(times):.0f}" for times in zip(*spent)) or NONE


COSTS = {"MB kept": memory, "s train / consolidate / evaluate": seconds}


def notes(rows):
    """What to be careful with in a table, line by line."""
    runs = [results for row in rows for results in row["runs"]]
    lines, own = [], set()
    if unfinished := [f"{row['label']} ({row['unfinished']})" for row in rows if row["unfinished"]]:
        lines.append(f"Left out as unfinished: {', '.join(unfinished)}.")
    for method in {row["method"] for row in rows}:
        own |= set(differing_keys([r for r in runs if r["method"] == method]))
    if others := [k for k in differing_keys(runs) if k not in own and not k.startswith(OWN)]:
        lines.append(f"CAUTION: the methods also differ in {', '.join(others)}.")
    environments = [results["environment"] for results in runs]
    if machines := sorted({f"{e['device']} ({e['threads']} threads)" for e in environments}):
        lines.append(f"Seconds on {' and '.join(machines)}.")
    names = [(r["commit"] or "unknown")[:8] + " with changes" * bool(r["dirty"]) for r in runs]
    commits = Counter(names)
    if len(commits) > 1:
        said = ", ".join(f"{commit} ({count})" for commit, count in commits.most_common())
        lines.append(f"Runs of several commits: {said}.")
    return lines
