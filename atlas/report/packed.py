"""Many runs in one compact file: docs/results/ holds the raw results of the tables in this form."""

import json
import os
from collections import Counter
from pathlib import Path

from atlas.errors import AtlasError
from atlas.results import checked, read_results

# keys that say where and how a run was made, not what it is
PLACES = ("name", "out_dir", "cache_dir", "device", "workers", "joint_run", "first_task")
DIGITS = {"seconds": 1, "peak_memory_mb": 0, "class_matrix": 3}  # decimals kept; else 5


def read_runs(path):
    """[results] of the folder of a run, or of a file that `pack` wrote."""
    if not Path(path).is_file():
        return [read_results(path)]
    try:
        packed = json.loads(Path(path).read_text(encoding="utf-8"))
        flat = []
        for group in packed["groups"]:
            flat += [packed["shared"] | group["shared"] | own for own in group["runs"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = "is no file of runs; give the folder of a run, or a file of eval.py --pack"
        raise AtlasError(f"{path} {said}") from None
    return [checked(path, nested(one)) for one in flat]


def pack(path, runs):
    """Write `runs` into one compact file, beside those that it holds; the same config is replaced.

    What most runs share is written once, for all and for each (seed, data_root). A key `a/b` stands
    for results["a"]["b"].
    """
    found = {}
    for results in [*(read_runs(path) if Path(path).is_file() else []), *runs]:
        setting = {k: v for k, v in results["config"].items() if k not in PLACES}
        found[json.dumps(setting, sort_keys=True)] = results
    groups = {}
    for results in found.values():
        place = (results["seed"], results["config"]["data_root"])
        groups.setdefault(place, []).append(flattened(results))
    parts = [split(group) for group in groups.values()]
    shared, of_groups = split([part[0] for part in parts])
    lines = []
    for own, (_, of_runs) in zip(of_groups, parts):
        inside = ",\n".join(map(compact, of_runs))
        lines.append(f'{{"shared":{compact(own)},"runs":[\n{inside}]}}')
    text = f'{{"shared":{compact(shared)},\n"groups":[\n' + ",\n".join(lines) + "]}\n"
    beside = Path(f"{path}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def flattened(results):
    """Its numbers are rounded."""
    flat = {}
    for key, value in results.items():
        digits = DIGITS.get(key, 5)
        for name, one in (value if isinstance(value, dict) else {"": value}).items():
            rounded = json.loads(
                json.dumps(one), parse_float=lambda x, n=digits: round(float(x), n)
            )
            flat[f"{key}/{name}".rstrip("/")] = rounded
    return flat


def nested(flat):
    results = {}
    for key, value in flat.items():
        outer, slash, inner = key.partition("/")
        place = results.setdefault(outer, {}) if slash else results
        place[inner or outer] = value
    return results


def split(dicts):
    """({key: value} that more than half of the dicts share, [what each has otherwise])."""
    shared = {}
    for key in dicts[0]:
        if all(key in one for one in dicts):
            text, count = Counter(compact(one[key]) for one in dicts).most_common(1)[0]
            if count > len(dicts) / 2:
                shared[key] = text
    own = [{k: v for k, v in one.items() if shared.get(k) != compact(v)} for one in dicts]
    return {key: json.loads(text) for key, text in shared.items()}, own


def compact(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
