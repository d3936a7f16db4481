r"""
Put the rows of all starts into one file, and print differences with Holm's correction: python collect.py rows/*.json OUTPUT.json

Fields that are equal in all rows stand once, under `shared`; fields of the contestants that no table needs leave.
"""

import json, sys
from math import sqrt
from statistics import mean, stdev
from scipy.stats import t, ttest_1samp

*inputs, output = sys.argv[1:]
NAMES = {
    "image in the last layer": "image in the last layer (VisionZip's choice)",
    "image in layer 3 at an exit's cost": "image in layer 3, as costly as divprune",
    "fewer pixels at an exit's cost, frozen": "fewer pixels, at most as costly as divprune",
}
rows = [row for path in inputs for row in json.load(open(path))]
for row in rows:
    row["selection"] = NAMES.get(row["selection"], row["selection"].replace(", exit", ", after the tower"))
    row["command"] = f"benchmarks/vlm_methods/run.py {row['seed']}"
    for name in ("layer", "scorer", "side", "fastv", "guide", "kept", "schedule"):
        row.pop(name, None)
    row["level"] = str(row["level"])
unpruned = [row for row in rows if row["selection"] == "unpruned"]
rows += [{**row, "level": level} for row in unpruned for level in ("7", "3") if row["level"] == "21"]
shared = {name: rows[0][name] for name in rows[0] if all(row[name] == rows[0][name] for row in rows)}
lines = [json.dumps({name: value for name, value in row.items() if name not in shared}) for row in rows]
text = '{\n  "shared": ' + json.dumps(shared) + ',\n  "rows": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"
open(output, "w").write(text)


def results(selection, level):
    return {
        row["seed"]: 100 * mean(row[f"accuracy_{kind}"] for kind in ("color", "shape", "presence"))
        for row in rows
        if (row["selection"], row["level"]) == (selection, level)
    }


tests = []
for level in ("21", "7", "3"):
    base = results("divprune, after the tower", level)
    for selection in sorted({row["selection"] for row in rows}):
        own = results(selection, level)
        gaps = [own[s] - base[s] for s in own.keys() & base.keys()]
        if selection != "divprune, after the tower" and len(gaps) > 2 and stdev(gaps) > 0:
            half = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / sqrt(len(gaps))
            tests.append(
                [float(ttest_1samp(gaps, 0).pvalue), level, selection, mean(own.values()), mean(gaps), half, len(gaps)]
            )
worst = 0
for rank, test in enumerate(sorted(tests)):
    worst = max(worst, min(1, test[0] * (len(tests) - rank)))
    print(
        "%2s tokens %-40s %5.1f  against divprune %+5.1f (%+.1f to %+.1f), %d starts, p = %.3f after Holm"
        % (test[1], test[2], test[3], test[4], test[4] - test[5], test[4] + test[5], test[6], worst)
    )
