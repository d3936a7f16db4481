"""
Write the tables of the README and the guide pages from the rows in `docs/results`. Tables of dated reports are frozen.

    python docs/tables.py            # rewrite every table between `<!-- table: NAME -->` and `<!-- end -->`
    python docs/tables.py --check    # exit with an error if a document has another table than its rows give

`make docs` and the tests run the check.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from trips_examples.analysis.paired import PairedDifference, holm, paired_difference


DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {}

Row = dict


def table(function: Callable[[], str]) -> Callable[[], str]:
    TABLES[function.__name__] = function
    return function


# Rows


@cache
def read(name: str) -> list[Row]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def select(rows: list[Row], **wanted) -> list[Row]:
    return [row for row in rows if all(row.get(field) == value for field, value in wanted.items())]


def variants(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each variant, in the order of the file."""
    return {name: select(rows, variant=name) for name in dict.fromkeys(row["variant"] for row in rows)}


def option(row: Row, name: str) -> list[str]:
    """Return the values behind the last `--name` of a row's command."""
    options = row["options"]
    places = [place for place, word in enumerate(options) if word == f"--{name}"]
    values = options[places[-1] + 1 :] if places else []
    return values[: next((place for place, word in enumerate(values) if word.startswith("--")), len(values))]


def schedule_of(row: Row) -> str:
    """Return the schedule of a row in code type: `5:text:0.7,10:text:0.7`, or that it is unpruned."""
    if "options" in row:
        fields = [option(row, name) for name in ("selection_layers", "keep_rate", "selection_guidance")]
    else:
        fields = [row["selection_layers"], row["keep_rate"], row.get("selection_guidance", "text")]
    layers, rates, guidance = (field if isinstance(field, list) else [field] for field in fields)
    if rates == ["1.0"]:
        return "unpruned"
    rates, guidance = (values * len(layers) if len(values) == 1 else values for values in (rates, guidance))
    return f"`{','.join(f'{layer}:{guide}:{rate}' for layer, guide, rate in zip(layers, guidance, rates))}`"


def model_of(row: Row) -> str:
    """Return the schedule of a run, or that it is unpruned, with its image size if it sees fewer pixels."""
    size = option(row, "image_size")
    return f"unpruned, {size[0]} px" if "fewer pixels" in row["variant"] else schedule_of(row)


# Cells


def percents(rows: list[Row], field: str) -> list[float]:
    return [100 * row[field] for row in rows if row.get(field) is not None]


def spread(values: list[float], digits: int = 1) -> str:
    """Return mean ± standard deviation; of a single value, the value alone."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def paired_by_seed(rows: list[Row], baseline: list[Row], field: str) -> PairedDifference | None:
    """Return the difference in points over common seeds; None below three seeds."""
    by_seed = {row["seed"]: row[field] for row in baseline}
    pairs = [(100 * row[field], 100 * by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    return None if len(pairs) < 3 or rows is baseline else paired_difference(*zip(*pairs))


def interval(difference: PairedDifference) -> str:
    """Return a difference in points with its 95% interval: `+0.4 (-0.3 to +1.0)`."""
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{difference.mean:+.1f} ({low:+.1f} to {high:+.1f})"


def seconds(
    times: list[Row], variant: str, field: str = "forward_seconds", baseline: str = "unpruned", **wanted
) -> str:
    """Return the time of a variant's checkpoint over that of the baseline's."""
    rows = {row["checkpoint"]: row for row in select(times, **wanted)}
    row, base = (rows.get(f"{name.replace(' ', '-')}-seed0") for name in (variant, baseline))
    return f"{row[field] / base[field]:.2f}" if row and field in row else ""


def render(header: list[str], rows: list[list], *sources: str, note: str = "") -> str:
    """Return a Markdown table, and the line that says where its rows are and what they do not record."""
    lines = [header, ["---"] * len(header), *rows]
    body = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    links = ", ".join(f"[{name.rpartition('/')[2]}]({{results}}/{name}.json)" for name in sources)
    links = links if len(sources) <= 5 else f"{len(sources)} files of `docs/results`"
    recorded = [row for name in sources for row in read(name)]
    facts = [*sorted({row["device_name"] for row in recorded if "device_name" in row}), note]
    for field, word in (("git_commit", "commit"), ("seed", "seed")):
        if lacking := sum(row.get(field) is None for row in recorded):
            facts.append(f"{lacking} of {len(recorded)} rows lack a {word}")
    return f"{body}\n\nRows: {links}. {'; '.join(fact for fact in facts if fact)}."


# Accuracy: independent starts, test split

ANSWERS = {
    "start": "all, the start itself",
    "unpruned": "all",
    "fewer pixels 64": "all, 64 px",
    "64 px from scratch": "all, 64 px from scratch",
    "gate": "text, gate",
    "earlier gate": "text, earlier gate (the best are kept)",
    "teacher": "text, attention of the start",
    "fused token": "text, fused token (the paper)",
    "fused token, drawn": "text, fused token, drawn patches",
    "start pruned": "text, the start itself",
    "image with gate": "image, gate",
    "constant query with gate": "constant query, gate",
    "region": "the region itself, gate",
    "random": "random",
}
ANSWER_PATCHES = {"start": 144, "unpruned": 144, "fewer pixels 64": 64, "64 px from scratch": 64}
ANSWER_RATES = {"0.25": 36, "0.1": 15, "0.02": 3}  # patches
ANSWER_KINDS = ("color", "shape", "presence")  # those that the starts answer
ANSWER_HEADER = ["Mean of three kinds, %", "Color, %", "Form, %", "Presence, %", "Place, %"]


def answer_runs(*names: str, prefix: str = "test_") -> dict[str, list[Row]]:
    """Return the rows of files by variant, with the mean over the kinds of questions that the starts answer."""
    rows = [row for name in names for row in read(name)]
    fields = [f"{prefix}accuracy_{kind}" for kind in ANSWER_KINDS]
    return variants([{**row, "mean": mean(row[field] for field in fields)} for row in rows])


def answer_scores(of: list[Row], prefix: str = "test_") -> list[str]:
    fields = ["mean", *(f"{prefix}accuracy_{kind}" for kind in (*ANSWER_KINDS, "place"))]
    return [spread(percents(of, field)) for field in fields]


def answer_gaps(runs: dict[str, list[Row]], pairs: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the differences of means of pairs of variants, with 95% intervals and p after Holm's correction."""
    found = [paired_by_seed(runs[one], runs[other], "mean") for one, other in pairs]
    corrected = holm([difference.p_value for difference in found])
    values = ("p < 0.01" if p < 0.01 else f"p = {p:.2f}" for p in corrected)
    cells = [f"{interval(difference)[:-1]}; {p})" for difference, p in zip(found, values)]
    return dict(zip(pairs, cells))


@table
def answers() -> str:
    """Questions about busy scenes by what scores the patches and what trains the scores, and the gate less each."""
    runs = answer_runs("answers")
    lines = [(name, name, "") for name in ANSWER_PATCHES if name in runs]
    lines += [(f"{way} {rate}", way, rate) for rate in ANSWER_RATES for way in ANSWERS if f"{way} {rate}" in runs]
    others = [(name, [rate] if rate else ANSWER_RATES) for name, way, rate in lines if way != "gate"]
    gaps = answer_gaps(runs, [(f"gate {rate}", name) for name, rates in others for rate in rates])
    rows = []
    for name, way, rate in lines:
        fields = ("test_layer2_patch_precision", "test_layer2_region_recall")
        inside = [spread(percents(runs[name], field)) if rate else "" for field in fields]
        cells = {of: gaps[f"gate {of}", name] for of in ANSWER_RATES if (f"gate {of}", name) in gaps}
        gap = "; ".join(cell if rate else f"{ANSWER_RATES[of]} patches {cell}" for of, cell in cells.items())
        patches = ANSWER_RATES[rate] if rate else ANSWER_PATCHES[name]
        rows.append([patches, ANSWERS[way], *answer_scores(runs[name]), *inside, gap])
    header = ["Patches", "Scored by, trained by", *ANSWER_HEADER, "Patch precision, %", "Region recall, %"]
    note = f"{len(runs['gate 0.1'])} independent starts, 200 steps each"
    return render([*header, "Gate - this, points (95%; Holm's p)"], rows, "answers", note=note)


REGIONS = {
    "gate 0.02": ("gate", "none"),
    "fused token 0.02": ("fused token", "none"),
    "selection loss": ("selection loss", "all"),
    "attention loss": ("attention loss", "all"),
    "both losses": ("both losses", "all"),
    "both losses, a tenth": ("both losses", "a tenth"),
    "both losses, a hundredth": ("both losses", "a hundredth"),
}


def rivals(rate: str) -> dict[str, tuple]:
    """Return patches and words of the contestants with a keep rate, and of the unpruned ones, by variant."""
    unpruned = {name: (ANSWER_PATCHES[name], ANSWERS[name]) for name in ("unpruned", "64 px from scratch")}
    ways = (way for way in ANSWERS if way not in ANSWER_PATCHES)
    return unpruned | {f"{way} {rate}": (ANSWER_RATES[rate], ANSWERS[way]) for way in ways}


def less_than_gate(
    *files: str,
    gate: str = "gate 0.02",
    untested: tuple[str, ...] = (),
    contestants: dict[str, tuple] | None = None,
    header: tuple[str, ...] = ("Patches", "Scored by, trained by"),
) -> str:
    """
    Return a table of the contestants that have as many starts in these files as the gate, and the gate less each but
    the untested. Keys of `contestants` (default: the `rivals` of the gate) are variants, values the cells of `header`.
    """
    contestants = rivals(gate.rpartition(" ")[2]) if contestants is None else contestants
    runs = answer_runs(*files)
    (steps,) = option(runs[gate][0], "max_steps")
    words = {name: words for name, words in contestants.items() if len(runs.get(name, [])) == len(runs[gate])}
    gaps = answer_gaps(runs, [(gate, name) for name in words if name not in (gate, *untested)])
    rows = [[*cells, *answer_scores(runs[name]), gaps.get((gate, name), "")] for name, cells in words.items()]
    header = [*header, *ANSWER_HEADER, "Gate - this, points (95%; Holm's p)"]
    return render(header, rows, *files, note=f"{len(runs[gate])} independent starts, {steps} steps each")


@table
def answers_regions() -> str:
    """What regions add with 3 patches to starts without them, and the gate less each variant."""
    header = ("Trained by", "Texts with regions")
    return less_than_gate("answers", "answers_regions", contestants=REGIONS, header=header)


@table
def answers_again() -> str:
    """Five more starts with 3 patches and their rivals, and the gate less each."""
    return less_than_gate("answers_again")


@table
def answers_longer() -> str:
    """The same starts after 400 steps at a higher rate, and the earlier gate less each contestant."""
    return less_than_gate("answers_longer", gate="earlier gate 0.02")


@table
def answers_drawn() -> str:
    """The gate that draws patches, its controls, and the contestants of `answers_longer`."""
    return less_than_gate("answers_drawn", "answers_longer", untested=("earlier gate 0.02",))


@table
def answers_drawn_15() -> str:
    """The same starts with 15 patches, and the gate less each contestant."""
    return less_than_gate("answers_drawn", "answers_longer", gate="gate 0.1")


@table
def answers_scratch() -> str:
    """The gate in models that were pruned from the first step, and these less the gate of an unpruned start."""
    scratch = "gate 0.02 from scratch"
    others = {name: rivals("0.02")[name] for name in ("gate 0.02", "64 px from scratch")}
    contestants = {scratch: (3, "text, gate, pruned from the first step")} | others
    return less_than_gate("answers_drawn", "answers_longer", gate=scratch, contestants=contestants)


@table
def answers_captions() -> str:
    """The gate and its rivals from starts that learnt captions before answers."""
    return less_than_gate("answers_captions")


@table
def answers_eight() -> str:
    """The contestants of `answers_drawn` that three more starts have, over all eight."""
    return less_than_gate("answers_drawn", "answers_longer", "answers_held_out")


@table
def answers_ten() -> str:
    """The contestants of `answers_again` that the first five starts had as well, over all ten starts."""
    return less_than_gate("answers", "answers_again")


@table
def answers_gate() -> str:
    """Questions about busy scenes by settings of the gate, with 3 patches, on validation scenes."""
    runs = answer_runs("answers_gate", prefix="eval_")
    rows = [[name, *answer_scores(of, "eval_")] for name, of in runs.items()]
    note = f"{len(runs['gate'])} trainings of 400 steps from one start, validation scenes"
    return render(["Setting", *ANSWER_HEADER], rows, "answers_gate", note=note)


@table
def vlm_answers() -> str:
    """A generative model's answers by what selects visual tokens, and the guide from answers less each."""
    runs, guide = variants(read("vlm_answers")), "guide from answers"
    levels = [name.rpartition(" ")[2] for name in runs if name.startswith(guide)]
    compared = {name: levels if name == "unpruned" else [name.rpartition(" ")[2]] for name in runs}
    pairs = [(f"{guide} {level}", name) for name, of in compared.items() for level in of]
    gaps = answer_gaps(runs, [(one, other) for one, other in pairs if one != other])
    rows = []
    for name, of in runs.items():
        tokens = [row["kept"] for row in of]
        way = name.removesuffix(f" {compared[name][0]}").replace("guide from constant", "constant query, from answers")
        numbers = " to ".join(map(str, dict.fromkeys([min(tokens), max(tokens)])))
        cells = [way, numbers, f"{mean(row['total_mmacs'] for row in of):.0f}", *answer_scores(of, prefix="")]
        gap = "; ".join(
            f"{one.rpartition(' ')[2]} tokens {cell}" for (one, other), cell in gaps.items() if other == name
        )
        rows.append([*cells, gap])
    header = [
        "Selection",
        "Visual tokens",
        "MMACs",
        *ANSWER_HEADER,
        "Guide from answers - this, points (95%; Holm's p)",
    ]
    note = f"{len(runs['unpruned'])} independent starts, {runs['unpruned'][0]['questions']:,} test questions each"
    return render(header, rows, "vlm_answers", note=note)


@table
def gate_trials() -> str:
    """Guides of a generative model from answers, by settings of the gate, on validation scenes."""
    files, rows = {"gate_trials": "best patches", "gate_trials_drawn": "drawn patches"}, []
    for file, gate in files.items():
        runs = variants(read(file))
        levels = list(dict.fromkeys(name.rpartition(" ")[2] for name in runs))
        for trial in dict.fromkeys(name.rpartition(" ")[0] for name in runs):
            of = [runs[f"{trial} {level}"] for level in levels]
            rows.append([gate, trial, len(of[0]), *(spread(percents(own, "mean")) for own in of)])
    header = ["In training", "Setting", "Starts", *(f"{level} of 64 tokens, %" for level in levels)]
    return render(header, rows, *files, note="validation scenes")


@table
def demo_runs() -> str:
    rows = []
    for row in sorted(read("demo_runs"), key=lambda row: (row["from_scratch"], row["bf16"], row["date"])):
        stages = [[row[f"{stage}_{kind}"] for kind in ANSWER_KINDS] for stage in ("unpruned", "pruned", "model")]
        scores = [f"{100 * mean(values):.1f}" for values in stages]
        start = "trained from scratch" if row["from_scratch"] else "shipped"
        precision = "bfloat16" if row["bf16"] else "float32"
        origin = [row["num_threads"], row["minutes"], row["git_commit"][:8]]
        rows.append([start, precision, row["seed"], *scores, *origin])
    header = [
        "Start",
        "Precision",
        "Seed",
        "All patches, %",
        "3 patches, before training, %",
        "3 patches, trained from answers, %",
    ]
    return render([*header, "Threads", "Minutes", "Commit"], rows, "demo_runs")


TASKS = {  # file: task, metric and its name
    "busy_grounding": ("[boxes](grounding.md), 96 px", "accuracy", "IoU of at least 0.5, %"),
    "busy_captioning": ("[captions](captioning.md), 48 px", "cider", "CIDEr x 100"),
    "busy_retrieval": ("[retrieval](retrieval.md), 48 px", "r_mean", "mean recall, %"),
    "busy_statements": ("[statements](statements.md), 48 px", "accuracy", "accuracy, %"),
}


@table
def tasks() -> str:
    """The tasks on busy scenes from the unpruned model that ships: schedules beside the unpruned baseline."""
    rows = []
    for file, (task, metric, measure) in TASKS.items():
        runs = variants(read(file))
        for name, of in runs.items():
            supervised = any(float(weight) for weight in option(of[0], "selection_loss_weight"))
            trained = ", selection loss" if supervised else ""
            if option(of[0], "selection_gate"):
                trained = ", earlier gate" if name.startswith("earlier ") else ", gate"
            gap = paired_by_seed(of, runs["unpruned"], f"test_{metric}")
            result = spread(percents(of, f"test_{metric}"))
            rows.append(
                [task, f"{schedule_of(of[0])}{trained}", measure, result, interval(gap) if gap else "", len(of)]
            )
    header = ["Task", "Schedule", "Measure", "Result", "This - unpruned, points (95%)", "Seeds"]
    return render(header, rows, *TASKS, note="trainings from one start, test split")


PRETRAINING = {  # measure: field of its result and of its chance, where not a half
    "matching (ITM)": ("itm_accuracy", None),
    "masked words (MLM)": ("mlm_accuracy", "mlm_majority"),
    "continuations (PrefixLM)": ("prefix_lm_accuracy", "prefix_lm_majority"),
    "image to text, R@1 among 100 images": ("features_i2t_r1", "chance_r1"),
    "text to image, R@1": ("features_t2i_r1", "chance_r1"),
}


@table
def pretraining() -> str:
    """Pre-training on busy scenes, unpruned."""
    of = read("busy_pretraining")
    rows = []
    for name, (field, chance) in PRETRAINING.items():
        guessed = mean(percents(of, f"eval_{chance}")) if chance else 50
        rows.append([name, spread(percents(of, f"eval_{field}")), f"{guessed:.1f}"])
    note = f"{len(of)} trainings from scratch, validation split"
    return render(["Measure", "Result, %", "Chance, %"], rows, "busy_pretraining", note=note)


# Speed

MACHINES = (
    "hardware/amd_epyc_1_thread",
    "hardware/intel_xeon_2_threads",
    "speed_bf16_base_cpu",
    "speed_float32_base_cpu",
)


def paper_schedule(**wanted) -> list[Row]:
    """Return the rows of the paper's schedule on all machines, by the time of a step."""
    rows = [row for name in MACHINES for row in select(read(name), selection_layers=[5, 10], **wanted)]
    return sorted(rows, key=lambda row: row["time_ratio"])


@table
def paper_speed() -> str:
    rows = []
    for mode, words in (("forward", "forward pass"), ("training", "training step")):
        for size in (224, 384):
            of = paper_schedule(mode=mode, image_size=size)
            fastest, slowest = of[0]["time_ratio"], of[-1]["time_ratio"]
            cells = [f"{fastest:.2f} to {slowest:.2f}", f"{1 / slowest:.2f} to {1 / fastest:.2f}", len(of)]
            rows.append([f"{size} px, {words}", f"{of[0]['macs_ratio']:.2f}", *cells])
    note = "CPUs of 2 cores, float32 and bfloat16, eager and compiled"
    return render(["Step", "MAC ratio", "Time ratio", "Speedup", "Measurements"], rows, *MACHINES, note=note)


@table
def speed_summary() -> str:
    rows = []
    for mode in ("forward", "training"):
        of = paper_schedule(mode=mode, image_size=384)
        times = f"{of[0]['time_ratio']:.2f} to {of[-1]['time_ratio']:.2f}"
        rows.append([f"{mode}, 1 text per image", schedule_of(of[0]), f"{of[0]['macs_ratio']:.2f}", times])
    for texts in (1, 10):
        for row in select(read("cost_by_texts_base_cpu"), texts_per_image=texts, batch_size=1):
            ratios = [f"{row[field]:.2f}" for field in ("macs_ratio", "time_ratio")]
            rows.append([f"forward, {texts} per image", schedule_of(row), *ratios])
    return render(["Step", "Schedule", "MAC ratio", "Time ratio"], rows, *MACHINES, "cost_by_texts_base_cpu")


def first_token(row: Row) -> tuple[float, float]:
    """Return the time to the first token and of a later one, over those of the unpruned model of this shape."""
    rows = [other for name in ("vlm_cost", "vlm_cost_batch_8") for other in read(name)]
    (unpruned,) = select(rows, shape=row["shape"], batch_size=row["batch_size"], variant="unpruned")
    return tuple(row[field] / unpruned[field] for field in ("seconds_to_first_token", "seconds_per_token"))


@table
def vllm_cpu() -> str:
    rows = []
    for row in read("vllm_cpu"):
        others = (select(read("vllm_cpu"), variant=other, clients=row["clients"])[0] for other in ("unpruned", "exit"))
        ratios = [f"{row['seconds_to_first_token'] / other['seconds_to_first_token']:.2f}" for other in others]
        cells = [f"{row['seconds_to_first_token']:.2f}", *ratios, f"{row['requests_per_second']:.2f}"]
        rows.append(
            [row["variant"], row["visual_tokens"], row["clients"], *cells, f"{row['cpu_seconds_per_request']:.1f}"]
        )
    header = [
        "Selection",
        "Visual tokens",
        "Clients",
        "First token, s",
        "To unpruned",
        "To exit",
        "Requests per second",
    ]
    note = f"one thread, float32, medians of {read('vllm_cpu')[0]['repeats']} interleaved rounds"
    return render([*header, "CPU s per request"], rows, "vllm_cpu", note=note)


# README


def compared(task: str, name: str, variant: str, start: str) -> list:
    """Return the line of one variant of a protocol: task, model, steps, accuracies, speedup with one text."""
    runs, times = variants(read(f"protocol_{name}")), read(f"protocol_{name}_times")
    _, comma, suffix = variant.partition(", ")
    baseline = f"unpruned{comma}{suffix}"
    of = runs[variant]
    steps = f"{int(option(of[0], 'max_steps')[0]):,}"
    accuracies = [spread(percents(rows, "test_accuracy")) for rows in (of, runs[baseline], read(start))]
    speedup = 1 / float(seconds(times, variant, baseline=baseline, texts_per_image=1))
    return [task, model_of(of[0]), "no" if suffix else "yes", steps, *accuracies, f"{speedup:.1f}x"]


def answered() -> list[list]:
    """Return the lines of the questions whose selection was learnt from answers."""
    runs, rows = answer_runs("answers_drawn", "answers_longer"), []
    for way in ("gate", "fused token", "image with gate"):
        of = runs[f"{way} 0.02"]
        scores = (spread(percents(rows, "mean")) for rows in (of, runs["unpruned"], runs["start"]))
        (steps,) = option(of[0], "max_steps")
        model = f"{schedule_of(of[0])}, {ANSWERS[way].partition(', ')[2]}"
        rows.append(["questions, busy scenes, 96 px", model, "no", steps, *scores, ""])
    return rows


@table
def headline() -> str:
    rows = [*answered(), compared("boxes, drawn images, 112 px", "images", "text 0.25", "protocol_images_starts")]
    of = paper_schedule(mode="forward", image_size=384, batch_size=8)
    speedup = f"{1 / of[-1]['time_ratio']:.2f}x to {1 / of[0]['time_ratio']:.2f}x"
    rows.append(["forward pass, base size, 384 px, batch 8", schedule_of(of[0]), *[""] * 5, speedup])
    shape = {"shape": "siglip_384", "batch_size": 1}
    both, after = (select(read("vlm_cost"), **shape, variant=name)[0] for name in ("tower and exit", "exit"))
    model = f"in and after the tower, {both['visual_tokens']} to 64 visual tokens"
    speedup = f"{1 / first_token(both)[0]:.1f}x (after only: {1 / first_token(after)[0]:.1f}x)"
    rows.append(["first token of LLaVA's form, 384 px", model, *[""] * 5, speedup])
    header = ["Task", "Model", "Regions", "Steps", "Accuracy, %", "Unpruned, same steps, %", "Start, %", "Speedup"]
    sources = ["answers_drawn", "answers_longer", "protocol_images", "protocol_images_times", "protocol_images_starts"]
    return render(header, rows, *sources, *MACHINES, "vlm_cost")


# Documents


def documents() -> list[Path]:
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def rewrite(path: Path) -> str:
    """Return the text of a document with its tables made anew."""
    results = os.path.relpath(RESULTS, path.parent)

    def fill(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"{path} asks for the table {name!r}, which docs/tables.py does not make.")
        return f"<!-- table: {name} -->\n\n{TABLES[name]().replace('{results}', results)}\n\n<!-- end -->"

    return TABLE.sub(fill, path.read_text(encoding="utf-8"))


def outdated() -> list[Path]:
    """Return the documents whose tables are not those of the rows."""
    return [path for path in documents() if rewrite(path) != path.read_text(encoding="utf-8")]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Write the tables of results into the documents.")
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a table is out of date.")
    if parser.parse_args(arguments).check:
        if names := [str(path.relative_to(DOCS.parent)) for path in outdated()]:
            raise SystemExit(f"Tables are out of date in {', '.join(names)}: run `python docs/tables.py`.")
        return
    for path in outdated():
        path.write_text(rewrite(path), encoding="utf-8")
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
