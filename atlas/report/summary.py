"""The table of one run, as text."""

from atlas.results import METRICS

BESIDE = {
    "listening": "   J minus J with another clip's sound",
    "mute_area": "   area masked when it hears nothing",
    "class_accuracy": "",
}


def shown(value):
    return "–" if value is None else f"{value:.3f}"


def row_text(results, k):
    """Row k of J, a number a task. A learned task is followed by its change against its best past
    score; a task that is not learned yet stands in brackets."""
    matrix = results["matrix"]["J"]
    if matrix[k] is None:
        return "not scored"
    learned = len(results["tasks"]) if results["method"] == "joint" and k else k
    words = []
    for j, value in enumerate(matrix[k]):
        past = [row[j] for row in matrix[j + 1 : k] if row]
        change = f" {value - max(past):+.2f}" if past else ""
        words.append(f"{value:.3f}{change}" if j < learned else f"({value:.3f})")
    return " | ".join(words)


def summary(results):
    """The matrix of J, the metrics and the costs of one run."""
    tasks, matrix = results["tasks"], results["matrix"]["J"]
    joint, stream = results["method"] == "joint", results["protocol"] == "tfcl"
    column, row = ("segment", "checkpoint") if stream else ("task", "task")
    stages = ["untrained", *(f"{row} {k + 1}" for k in range(len(tasks)))]
    stages = ["untrained", "joint"] if joint else stages
    width = len(column) + 3
    lines = [
        f"{results['method']} · {results['protocol'].upper()} · seed {results['seed']}\n",
        f"R, J on test clips: a row after each {row}, a column for each {column}",
        " " * 13 + "".join(f"{f'{column} {j + 1}':>{width}}" for j in range(len(tasks))),
    ]
    for name, scores in zip(stages, matrix):
        cells = [f"{shown(value):>{width}}" for value in scores or [None] * len(tasks)]
        lines.append(f"{name:<13}" + "".join(cells))
    if not results["complete"]:
        lines.append(f"\nnot finished: {len(matrix)} of {len(stages)} rows. The command that began")
        return "\n".join([*lines, "this run goes on with --resume."])
    lines += ["", *scores_text(results["metrics"]), ""]
    if stream and not joint:
        steps = [str(found["step"]) for found in results["consolidations"]]
        lines.append(f"consolidated after steps {', '.join(steps) or 'none'}")
        lines += [f"the data drift at steps   {', '.join(map(str, results['drifts']))}", ""]
    return "\n".join(lines + costs_text(results))


def scores_text(metrics):
    J, F = metrics["J"], metrics["F"]
    lines = [f"{'':<14}{'J':>6}  {'F':>6}"]
    for name in METRICS:
        if J[name] is not None:
            lines.append(f"{name:<14}{shown(J[name]):>6}  {shown(F[name]):>6}")
    for name, said in BESIDE.items():
        if metrics[name] is not None:
            lines.append(f"{name.replace('_', ' '):<14}{shown(metrics[name]):>6}{said}")
    if found := metrics.get("source_disjoint"):
        said = f"the {found['clips']} test clips whose source video has no train clip"
        lines.append(f"{'disjoint':<14}{shown(found['J']):>6}  {shown(found['F']):>6}   {said}")
    return lines


def costs_text(results):
    """Parameters, memory and seconds, and a warning of random weights."""
    p, kept = results["parameters"], results.get("method_memory_bytes")
    said = f"{p['total']:,} without the audio encoder, {p['trainable']:,} trainable"
    lines = [f"parameters: {said}, {p['lora']:,} of them LoRA"]
    if kept is not None:
        lines.append(f"memory: the method keeps {kept / 1e6:.1f} MB beside the model")
    words = {"train": "training", "consolidate": "consolidating", "evaluate": "evaluating"}
    spent = [f"{sum(results['seconds'][part]):.0f} {word}" for part, word in words.items()]
    lines.append(f"seconds: {', '.join(spent)}")
    random = [name for name, w in results["weights"].items() if w["source"] == "random"]
    if random:
        lines.append(f"note: the {' and '.join(random)} encoder has random weights, not pretrained")
    return lines
