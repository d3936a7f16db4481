r"""
Write the tables of the report on busy scenes between its markers.

    python benchmarks/vlm_small/report.py docs/reports/2026-11-27-vlm-scenes.md
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from scipy.stats import binomtest


RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
KEPT = (72, 36, 16, 9)
EXACT = "TextGuide from regions, tower"
# Rows whose selection has no parameters of its own.
UNTRAINED = ("random", "pooling", "image", "max-min", "prompt", "FastV", "fewer pixels")
KINDS = ("color", "shape", "place", "presence")


class Rows:
    """Rows of the test split, by name and number of tokens; one per seed."""

    def __init__(self, rows: list[dict]):
        self.rows = [row for row in rows if row["split"] == "test"]
        self.seeds = sorted({row["seed"] for row in self.rows})
        self.names = list(dict.fromkeys(row["name"] for row in self.rows))

    def of(self, name: str, kept: int | None = None) -> list[dict]:
        return [row for row in self.rows if row["name"] == name and kept in (None, row["kept"])]

    def keys(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys((row["name"], row["kept"]) for row in self.rows))


def mean(rows: list[dict], field: str = "accuracy", factor: float = 100) -> float:
    return factor * statistics.mean(row[field] for row in rows)


def accuracy(rows: list[dict], field: str = "accuracy") -> str:
    if not rows:
        return ""
    spread = f" ± {100 * statistics.stdev(row[field] for row in rows):.1f}" if len(rows) > 1 else ""
    return f"{mean(rows, field):.1f}{spread}"


def bits(row: dict) -> list[bool]:
    return [bit == "1" for bit in f"{int(row['correct'], 16):0{row['questions']}b}"]


def mcnemar(rows: list[dict], others: list[dict]) -> tuple[int, int, float]:
    """Questions that one alone answers, that the other alone answers, and the exact two-sided p-value."""
    one = other = 0
    for row in rows:
        rival = next(own for own in others if own["seed"] == row["seed"])
        for first, second in zip(bits(row), bits(rival), strict=True):
            one += first and not second
            other += second and not first
    return one, other, binomtest(one, one + other).pvalue if one + other else 1.0


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(rows: Rows) -> str:
    unpruned = accuracy(rows.of("unpruned"))
    names = [name for name in rows.names if len({row["kept"] for row in rows.of(name)} & set(KEPT)) == len(KEPT)]
    body = [[name, *(accuracy(rows.of(name, kept)) for kept in KEPT)] for name in names]
    body += [
        [name, *("" if side is None else accuracy(rows.of(name, side * side)) for side in (8, 6, 4, 3))]
        for name in ("fewer pixels", "fewer pixels, fine-tuned")
    ]
    return f"Unpruned, 144 visual tokens: {unpruned}.\n\n" + table(["", *(f"{kept} tokens" for kept in KEPT)], body)


def cost_table(rows: Rows, kept: int) -> str:
    chosen = [("unpruned", 144), *(key for key in rows.keys() if key[1] == kept)]
    body = []
    for name, number in chosen:
        own = rows.of(name, number)
        body.append(
            [
                name,
                accuracy(own),
                *(f"{mean(own, f'accuracy_{kind}'):.1f}" for kind in KINDS),
                *(f"{mean(own, f'{part}_mmacs', 1):.1f}" for part in ("tower", "prefill", "total")),
                f"{mean(own, 'kv_bytes', 1) / 1024:.0f}",
            ]
        )
    head = [f"{kept} tokens", "accuracy", *KINDS, "tower MMACs", "prefill MMACs", "total MMACs", "KV KiB"]
    return table(head, body)


def rivals(rows: Rows, kept: int, may: Callable[[str], bool]) -> list[tuple[str, int]]:
    """Rows that cost at most what the guide does, best first."""
    limit = mean(rows.of(EXACT, kept), "total_mmacs", 1) * 1.001
    keys = [key for key in rows.keys() if may(key[0]) and mean(rows.of(*key), "total_mmacs", 1) <= limit]
    return sorted(keys, key=lambda key: -mean(rows.of(*key)))


def equal_cost_table(rows: Rows) -> str:
    body = []
    for kept in (16, 9):
        guide = rows.of(EXACT, kept)
        body.append(
            [f"**{EXACT}, {kept} tokens**", accuracy(guide), f"{mean(guide, 'total_mmacs', 1):.1f}", "", "", ""]
        )
        chosen = rivals(rows, kept, lambda name: name.startswith(UNTRAINED) and "fine-tuned" not in name)[:5]
        chosen += rivals(rows, kept, lambda name: "fine-tuned" in name)[:1]
        chosen += [key for key in rows.keys() if key[1] == kept and key[0].startswith("TextGuide") and key[0] != EXACT]
        chosen += [("max-min diversity, exit", kept), ("prompt and diversity, exit", kept), ("FastV", kept)]
        for name, number in [*chosen, ("unpruned", 144)]:
            own = rows.of(name, number)
            one, other, p = mcnemar(guide, own)
            difference = mean(guide) - mean(own)
            body.append(
                [
                    f"{name}, {number} tokens",
                    accuracy(own),
                    f"{mean(own, 'total_mmacs', 1):.1f}",
                    f"{difference:+.1f}",
                    f"{one} : {other}",
                    "< 0.0001" if p < 1e-4 else f"{p:.4f}",
                ]
            )
    return table(["", "accuracy", "total MMACs", "guide's lead", "alone correct", "p (McNemar)"], body)


def times_table(rows: list[dict]) -> str:
    body = [
        [
            f"{row['name']}, {row['kept']} tokens",
            *(f"{row[f'{part}_ms']:.1f}" for part in ("tower", "prefill", "decoding")),
            f"{row['tower_ms'] + row['prefill_ms']:.1f}",
        ]
        for row in rows
    ]
    return table(["", "tower", "prefill", "one decoding step", "tower and prefill"], body)


def main(path: str):
    rows = Rows(json.loads((RESULTS / "vlm_scenes.json").read_text()))
    tables = {
        "accuracy": accuracy_table(rows),
        "costs": "\n\n".join(cost_table(rows, kept) for kept in (16, 9)),
        "equal_cost": equal_cost_table(rows),
    }
    if (RESULTS / "vlm_scenes_times.json").exists():
        tables["times"] = times_table(json.loads((RESULTS / "vlm_scenes_times.json").read_text()))
    page = Path(path).read_text()
    for name, text in tables.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    Path(path).write_text(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
