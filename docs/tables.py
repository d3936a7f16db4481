"""
Write the tables of `docs/evidence.md` from the rows in `docs/results`: `python docs/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `make docs` and the tests fail if it is out of date.
"""

import json
import re
import textwrap
from functools import partial
from itertools import groupby
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t


DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "evidence.md"
TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
KINDS = ("color", "shape", "presence")  # of questions about older scenes, without places


def read(name: str) -> list[dict]:
    """Return the rows of a file, which has the fields that are equal in all of them once."""
    content = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return [{**content["shared"], **row} for row in content["rows"]]


def groups(rows: list[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Return the rows by their values of these fields, sorted by these."""

    def values(row: dict) -> tuple:
        return tuple(row[field] for field in fields)

    return {key: list(of) for key, of in groupby(sorted(rows, key=values), values)}


def percents(rows: list[dict], field: str) -> dict[int, float]:
    """Return a result in percent by seed; `mean` is that of the kinds of questions, `all` that with marks."""
    kinds = {"mean": KINDS, "all": (*KINDS, "mark")}.get(field)
    fields = [field] if kinds is None else [f"accuracy_{kind}" for kind in kinds]
    return {row["seed"]: 100 * mean(row[name] for name in fields) for row in rows if fields[0] in row}


def spread(rows: list[dict], field: str) -> str:
    """Return mean ± standard deviation over the seeds."""
    values = list(percents(rows, field).values())
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}" if values else ""


def gap(rows: list[dict], others: list[dict], field: str) -> str:
    """Return the mean difference over the seeds of both, its 95% interval, and the smallest and largest difference."""
    one, other = percents(rows, field), percents(others, field)
    gaps = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    if rows is others or len(gaps) < 3:
        return ""
    center, half = mean(gaps), float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / sqrt(len(gaps))
    return f"{center:+.1f} ({center - half:+.1f} to {center + half:+.1f}); {min(gaps):+.1f} to {max(gaps):+.1f}"


def render(header: str, rows: list[list]) -> str:
    lines = [header.split(" | "), ["---"] * len(header.split(" | ")), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def sources() -> str:
    """Return the files of the rows, with their machines, and what rows lack."""
    parts = []
    for name in sorted(path.stem for path in (DOCS / "results").glob("*.json")):
        rows = read(name)
        devices = ", ".join(sorted({row["device_name"] for row in rows}))
        without = ", older rows without commit and seed" if any("git_commit" not in row for row in rows) else ""
        parts.append(f"[{name}](results/{name}.json): {len(rows)} rows, {devices}{without}")
    return textwrap.fill("; ".join(parts) + ".", 120, break_on_hyphens=False)


def pivot(name: str) -> str:
    """Return a table with a line for each setting and a column for each value of a field, the baseline first."""
    header, fields, column, cell = PIVOTS[name]
    columns, rows = header.split(" | ")[len(fields) :], []
    for key, of in groups(read(name), *fields).items():
        found = {str(row[column]): row for row in of}
        first = found[columns[0]].get("seconds_to_first_token", 1)
        ratios = {word: row.get("seconds_to_first_token", 1) / first for word, row in found.items()}
        rows.append([*key, *(cell.format(**found[word], ratio=ratios[word]) for word in columns)])
    return render(header, rows)


def answers() -> str:
    """What scores the patches and what trains the scores, and the gate with as many patches less this."""
    runs, rows = groups(read("answers"), "starts_from", "patches", "scored_by", "learns_from", "steps"), []
    for (starts_from, patches, *words, steps), of in runs.items():
        gates = {kept: runs.get((starts_from, kept, "text", "gate", steps), of) for kept in (3, 15)}
        gaps = {kept: gap(gate, of, "mean") for kept, gate in gates.items() if patches > 15 or patches == kept}
        scores = [spread(of, field) for field in ("mean", *(f"accuracy_{kind}" for kind in KINDS), "patch_precision")]
        named = "; ".join(f"{kept} patches {text}" if patches > 15 else text for kept, text in gaps.items() if text)
        rows.append([starts_from, patches, *words, steps, len(of), *scores, named])
    header = "Starts from | Patches | Scored by | Scores learn from | Steps | Starts | Mean | Color | Form | Presence"
    return render(f"{header} | Precision | Gate - this", rows)


def marks() -> str:
    runs, rows = groups(read("marks"), "patches", "steps", "scored_by", "learns_from", "starts_from"), []
    for (patches, steps, *words, starts_from), of in reversed(runs.items()):
        scores = ("all", *(f"accuracy_{kind}" for kind in ("mark", *KINDS, "new_wording")), "patch_precision")
        difference = gap(of, runs.get((1, steps, "text", "gate", starts_from), of), "all")
        accuracies = (spread(of, score) for score in scores)
        rows.append([patches, *words, steps, starts_from, len(of), *accuracies, difference])
    header = "Patches | Scored by | Scores learn from | Steps | Starts from | Trainings | Mean | Mark | Color | Form"
    return render(f"{header} | Presence | New wordings | Precision | This - gate", rows)


def tasks() -> str:
    runs, rows = groups(read("tasks"), "task", "measure", "schedule", "learns_from"), []
    for (task, measure, *words), of in runs.items():
        macs = (of[0].get(field) for field in ("macs_ratio", "macs_ratio_4_texts"))
        cost = of[0]["patches"], *("" if ratio is None else f"{ratio:.2f}" for ratio in macs)
        difference = gap(of, runs.get((task, measure, "unpruned", ""), of), "result")
        rows.append([task, measure, *words, *cost, spread(of, "result"), difference, len(of)])
    header = "Task | Measure | Schedule | Scores learn from | Patches | MACs, 1 text | MACs, 4 texts"
    return render(f"{header} | Result | This - unpruned | Seeds", rows)


def vlm_answers() -> str:
    runs, rows = groups(read("vlm_answers"), "selection", "level"), []
    for selection in dict.fromkeys(name for name, _ in runs):
        at = [runs[selection, level] for level in ("21", "7", "3")]
        cost = f"{mean(row['total_mmacs'] for row in at[1]):.0f}"
        difference = gap(runs["guide from answers", "7"], at[1], "mean")
        rows.append([selection, *(spread(of, "mean") for of in at), cost, difference])
    return render("Selection | 21 tokens, % | 7, % | 3, % | MMACs, 7 | Guide from answers - this, 7", rows)


def speed() -> str:
    rows = []
    fields = ("mode", "gate", "image_size", "batch_size", "texts_per_image", "schedule")
    for key, of in groups(read("speed"), *fields).items():
        times = [f"{found(row['time_ratio'] for row in of):.2f}" for found in (min, max)]
        rows.append([*key, f"{of[0]['macs_ratio']:.2f}", " to ".join(dict.fromkeys(times)), len(of)])
    return render("Step | Gate | Pixels | Batch | Texts per image | Schedule | MACs | Time | Settings", rows)


def export() -> str:
    rows = [[row["way"], f"{row['speedup']:.2f}", f"{100 * row['same_patches']:.1f}"] for row in read("export")]
    return render("Engine and precision | Speedup | Same kept patches, %", rows)


FIRST_TOKEN = "Shape | Batch | unpruned | exit | tower | tower and exit"
VLLM = "Clients | unpruned | exit | tower and exit"
PIVOTS = {
    "speed_by_texts": ("Schedule | 1 | 10", ["schedule"], "texts_per_image", "{macs_ratio:.2f}, {time_ratio:.2f}"),
    "first_token": (FIRST_TOKEN, ["shape", "batch_size"], "variant", "{ratio:.2f}"),
    "vllm": (VLLM, ["clients"], "variant", "{ratio:.2f}, {requests_per_second:.2f}"),
}
TABLES = {function.__name__: function for function in (marks, answers, tasks, vlm_answers, speed, export, sources)}
TABLES |= {name: partial(pivot, name) for name in PIVOTS}


def rewrite(text: str) -> str:
    """Return the text of a page with its tables made anew."""
    return TABLE.sub(lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->", text)


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
