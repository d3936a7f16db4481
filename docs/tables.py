"""
Write the tables of README, evidence page and appendix from the rows in `docs/results`: `python docs/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `docs/tables.toml` says what it shows. `make docs`
and the tests fail if a table is out of date.
"""

import json
import re
import tomllib
from collections import defaultdict
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t


DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
PAGES = (DOCS.parent / "README.md", DOCS / "evidence.md", RESULTS / "README.md")
MARKER = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)

SETTINGS = tomllib.loads((DOCS / "tables.toml").read_text(encoding="utf-8"))
TABLES = SETTINGS["tables"]

Rows = list[dict]
Line = dict[str, str]  # the cells of a line of a table by their headers


def read(name: str) -> Rows:
    """Return the rows of a file, which has the fields that are equal in nearly all of them once. No file: no rows."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return [{**content["shared"], **row} for row in content["rows"]]


def group(rows: Rows, fields: list[str]) -> dict[tuple, Rows]:
    """Return the rows by their values of these fields, sorted by these, an unpruned baseline first."""
    groups = defaultdict(list)
    for row in rows:
        key = tuple(row[field] for field in fields)
        groups[key].append(row)

    def order(key: tuple) -> list[tuple]:
        return [(value not in SETTINGS["first"], value) for value in key]

    return {key: groups[key] for key in sorted(groups, key=order)}


def span(rows: Rows, field: str) -> str:
    """Return the smallest and the largest value, or the only one."""
    values = [row[field] for row in rows if field in row]
    if not values:
        return ""
    ends = (min(values), max(values))
    if isinstance(values[0], float):
        texts = [f"{end:.2f}" for end in ends]
    else:
        texts = [str(end) for end in ends]
    return " to ".join(dict.fromkeys(texts))


def percents(rows: Rows, field: str) -> dict[int | None, float]:
    """Return a result in percent by seed."""
    fields = SETTINGS["means"].get(field, [field])
    results = {}
    for row in rows:
        if fields[0] in row:
            result = mean(row[name] for name in fields)
            results[row.get("seed")] = 100 * result
    return results


def spread(rows: Rows, field: str) -> str:
    """Return mean ± standard deviation over the seeds."""
    values = list(percents(rows, field).values())
    if not values:
        return ""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"


def find_baseline(table: dict, key: tuple, groups: dict[tuple, Rows]) -> tuple[str, Rows]:
    """Return the name and the rows of the first baseline that there is for a line; for a baseline, its own rows."""
    setting = dict(zip(table["settings"].values(), key))
    baselines = table.get("baselines", {})
    for name, changes in baselines.items():
        baseline = tuple({**setting, **changes}.values())
        if baseline in groups and baseline != key:
            return name, groups[baseline]
    return "", groups[key]


def compare(rows: Rows, name: str, baseline: Rows, field: str) -> Line:
    """Return the cells of the mean difference over the seeds of both, empty for less than three seeds."""
    headers = ("Baseline", "Difference", "95% interval", "Its result", "Smallest to largest")
    line = dict.fromkeys(headers, "")
    results = percents(rows, field)
    others = percents(baseline, field)
    gaps = [results[seed] - others[seed] for seed in results.keys() & others.keys()]
    if name and len(gaps) >= 3:
        center = mean(gaps)
        quantile = float(t.ppf(0.975, df=len(gaps) - 1))
        half = quantile * stdev(gaps) / sqrt(len(gaps))
        line["Baseline"] = name
        line["Its result"] = spread(baseline, field)
        line["Difference"] = f"{center:+.1f}"
        line["95% interval"] = f"{center - half:+.1f} to {center + half:+.1f}"
        line["Smallest to largest"] = f"{min(gaps):+.1f} to {max(gaps):+.1f}"
    return line


def make_line(table: dict, key: tuple, groups: dict[tuple, Rows]) -> Line:
    """Return the line of the rows with these settings."""
    rows = groups[key]
    name, baseline = find_baseline(table, key, groups)
    line = {}
    for (header, field), value in zip(table["settings"].items(), key):
        words = SETTINGS["words"].get(field, {})
        line[header] = words.get(value, str(value)) or "-"
    fields = list(table.get("percents", {}).items())
    for header, field in fields[:1]:
        line[header] = spread(rows, field)
        if "baselines" in table:
            line |= compare(rows, name, baseline, field)
    line["Runs"] = str(len(rows))
    line["Starts"] = SETTINGS["starts"].get(rows[0].get(table.get("starts")), "")
    for header, field in fields[1:]:
        line[header] = spread(rows, field)
    for header, field in table.get("values", {}).items():
        line[header] = span(rows, field)
    for header, field in table.get("ratios", {}).items():
        line[header] = f"{rows[0][field] / baseline[0][field]:.2f}"
    return line


def lines_of(name: str) -> list[Line]:
    """Return the lines of a whole table, without columns that are empty."""
    table = TABLES[name]
    fields = list(table["settings"].values())
    groups = group(read(name), fields)
    lines = [make_line(table, key, groups) for key in groups]
    for header in list(lines[0]) if lines else []:
        if not any(line[header] for line in lines):
            for line in lines:
                del line[header]
    return lines


def excerpt(name: str) -> list[Line]:
    """Return some lines and columns of a whole table, in the order of the excerpt."""
    part = SETTINGS["excerpts"][name]
    new_names = part.get("rename", {})
    all_lines = lines_of(part["table"])
    lines = []
    for wanted in part["lines"]:
        for line in all_lines:
            if wanted.items() <= line.items():
                lines.append({new_names.get(header, header): line[header] for header in part["columns"]})
    return lines


def render(lines: list[Line]) -> str:
    """Return a table in Markdown."""
    if not lines:
        return "No rows yet."
    headers = list(lines[0])
    cells = [headers, ["---"] * len(headers)]
    cells += [list(line.values()) for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def table_of(marker: re.Match) -> str:
    """Return the text from the marker of a table to its end."""
    name = marker[1]
    if name in TABLES:
        lines = lines_of(name)
    else:
        lines = excerpt(name)
    return f"<!-- table: {name} -->\n{render(lines)}\n<!-- end -->"


def rewrite(text: str) -> str:
    """Return the text of a page with its tables made anew."""
    return MARKER.sub(table_of, text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(rewrite(text), encoding="utf-8")
