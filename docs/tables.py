"""
Write the tables of results into the documents, from the rows in `docs/results`.

    python docs/tables.py            # rewrite every table between `<!-- table: NAME -->` and `<!-- end -->`
    python docs/tables.py --check    # exit with an error if a document has another table than its rows give

`make docs` and the tests run the check.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig
from modeling_trips.configuration_trips import GUIDANCES
from modeling_trips.inspection.cost import forward_cost
from trips_examples.analysis.paired import PairedDifference, exact_sign_test, paired_difference


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
    """The rows of each variant, in the order of the file."""
    return {name: select(rows, variant=name) for name in dict.fromkeys(row["variant"] for row in rows)}


def option(row: Row, name: str) -> list[str]:
    """The values behind the last `--name` of a row's command."""
    options = row["options"]
    places = [place for place, word in enumerate(options) if word == f"--{name}"]
    values = options[places[-1] + 1 :] if places else []
    return values[: next((place for place, word in enumerate(values) if word.startswith("--")), len(values))]


def schedule(layers: list, rates: list, guidance: list) -> str:
    """`5:text:0.7,10:text:0.7`"""
    rates, guidance = (values * len(layers) if len(values) == 1 else values for values in (rates, guidance))
    return ",".join(f"{layer}:{guide}:{rate}" for layer, guide, rate in zip(layers, guidance, rates))


def schedule_of(row: Row) -> str:
    """In code type, from a row's command, or from its fields."""
    if "options" in row:
        fields = [option(row, name) for name in ("selection_layers", "keep_rate", "selection_guidance")]
    else:
        fields = [row["selection_layers"], row["keep_rate"], row.get("selection_guidance", "text")]
    layers, rates, guidance = (field if isinstance(field, list) else [field] for field in fields)
    return "unpruned" if rates == ["1.0"] else f"`{schedule(layers, rates, guidance)}`"


def model_of(row: Row) -> str:
    """The schedule of a run in code type, or that it is unpruned, with its image size if it sees fewer pixels."""
    size = option(row, "image_size")
    return f"unpruned, {size[0]} px" if "fewer pixels" in row["variant"] else schedule_of(row)


def method(row: Row, supervised: bool = True) -> str:
    """How a run selects, in words. `supervised`: whether the code of its day supervised the text by default."""
    text = model_of(row)
    if text.startswith("unpruned"):
        return "unpruned baseline" if text == "unpruned" else text
    weight = option(row, "selection_loss_weight")
    if "text" in text:
        teacher = option(row, "selection_teacher")
        without = not supervised or weight == ["0"]
        text += ", with a teacher" if teacher else f", {'without' if without else 'with'} supervision"
    if option(row, "selection_mode") == ["mass"]:
        text = f"`2:text:top-p {option(row, 'selection_mass')[0]}`, with supervision"
    return text + (", the rest merged" if option(row, "merge_inattentive_tokens") else "")


# Cells


def percents(rows: list[Row], field: str) -> list[float]:
    return [100 * row[field] for row in rows if row.get(field) is not None]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; of a single value, the value alone."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def paired_by_seed(
    rows: list[Row], baseline: list[Row], field: str, scale: float = 100
) -> tuple[PairedDifference, str] | None:
    """The difference over common seeds, and p of the paired t-test in words; None below three seeds."""
    by_seed = {row["seed"]: row[field] for row in baseline}
    pairs = [(scale * row[field], scale * by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    if len(pairs) < 3 or rows is baseline:
        return None
    found = paired_difference(*zip(*pairs))
    return found, f"p = {found.p_value:.2f}" if found.p_value >= 0.01 else "p < 0.01"


def difference(rows: list[Row], baseline: list[Row], field: str, scale: float = 100, digits: int = 1) -> str:
    """Mean difference ± deviation, and p; empty below three seeds."""
    if (paired := paired_by_seed(rows, baseline, field, scale)) is None:
        return ""
    found, p = paired
    return f"{found.mean:+.{digits}f} ± {found.deviation:.{digits}f} ({p})"


def render(header: list[str], rows: list[list], *sources: str, note: str = "") -> str:
    """A Markdown table, and the line that says where its rows are and what they do not record."""
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


def seconds(
    times: list[Row], variant: str, field: str = "forward_seconds", baseline: str = "unpruned", **wanted
) -> str:
    """The time of a variant's checkpoint over that of the baseline's."""
    rows = {row["checkpoint"]: row for row in select(times, **wanted)}
    row, base = (rows.get(f"{name.replace(' ', '-')}-seed0") for name in (variant, baseline))
    return f"{row[field] / base[field]:.2f}" if row and field in row else ""


# Guidance


@table
def guidance_questions() -> str:
    runs = variants(read("scenes_vqa_guidance"))
    rows = [
        [
            method(of[0], supervised=False),
            spread(percents(of, "eval_accuracy")),
            difference(of, runs["unpruned"], "eval_accuracy"),
            spread(percents(of, "eval_layer2_patch_precision"), 0),
        ]
        for of in runs.values()
    ]
    header = ["Selection", "Accuracy, %", "Difference to unpruned, points", "Patch precision, % (chance: 25)"]
    return render(header, rows, "scenes_vqa_guidance", note="3 seeds")


@table
def guidance_boxes() -> str:
    rows = [
        [
            method(row, supervised=False),
            f"{100 * row['eval_accuracy']:.1f}",
            f"{row['eval_mean_iou']:.3f}",
            spread(percents([row], "eval_layer2_patch_precision")),
        ]
        for row in read("scenes_grounding_guidance")
    ]
    header = ["Selection", "Grounding accuracy, %", "Mean IoU", "Patch precision, % (chance: 2.6)"]
    return render(header, rows, "scenes_grounding_guidance", note="single seed, indicative only")


def learning(name: str, epochs: int) -> str:
    runs, times = variants(read(name)), read(f"{name}_times")
    rows = [
        [
            method(of[0]),
            *(spread([100 * row["history"][epoch]["eval_accuracy"] for row in of]) for epoch in range(epochs)),
            difference(of, runs["unpruned"], "eval_accuracy"),
            spread([row["minutes"] for row in of]),
            seconds(times, variant, "training_seconds"),
        ]
        for variant, of in runs.items()
    ]
    curve = [f"Epoch {epoch + 1}, %" for epoch in range(epochs)]
    header = ["Selection", *curve, "Last epoch less unpruned, points", "Minutes", "Time of a training step"]
    return render(header, rows, name, f"{name}_times", note="3 seeds")


TABLES["learning_questions"] = partial(learning, "scenes_learning", 4)
TABLES["learning_boxes"] = partial(learning, "scenes_learning_boxes", 3)


def rates(name: str) -> str:
    runs, times = variants(read(name)), read(f"{name}_times")
    rows = [
        [
            method(of[0]),
            spread(percents(of, "eval_accuracy")),
            difference(of, runs["unpruned"], "eval_accuracy"),
            seconds(times, variant),
            "/".join(f"{100 * mean(values):.0f}" for values in last_layer(of, *FOUND) if values),
        ]
        for variant, of in runs.items()
    ]
    header = ["Selection", "Accuracy, %", "Difference to unpruned, points", "Time", "Patch precision/region recall, %"]
    note = "3 seeds where a cell has a deviation, otherwise a single seed, indicative only"
    return render(header, rows, name, f"{name}_times", note=note)


def last_layer(rows: list[Row], *measures: str) -> list[list[float]]:
    """The values of each measure at the last selection layer."""
    layers = option(rows[0], "selection_layers")
    return [
        [row[field] for row in rows if field in row]
        for measure in measures
        for field in [f"eval_layer{layers[-1] if layers else 0}_{measure}"]
    ]


TABLES["rates_boxes"] = partial(rates, "scenes_grounding_rates")
TABLES["rates_questions"] = partial(rates, "scenes_vqa_rates")


# The protocol: independent starts, the same regions for all, test split

PROTOCOL_PIXELS = {"0.05": 64, "0.25": 72, "0.5": 80, "0.7": 88}  # sides that cost as much as the keep rates
PROTOCOL_SIZE = 96
PROTOCOL_TASKS = {"questions": "protocol_questions", "boxes": "protocol_boxes"}
# Metrics of a selection layer, and what a table calls them.
FOUND = ("patch_precision", "region_recall")
FOUND_HEADER = ["Patch precision, %", "Region recall, %"]


@cache
def protocol_macs(image_size: int, text: str | None, texts: int) -> float:
    """MACs of a schedule at an image size over those of the unpruned model at 96 pixels."""
    config = TripsConfig.from_preset("tiny", vision_config={"image_size": image_size})
    full = TripsConfig.from_preset("tiny", vision_config={"image_size": PROTOCOL_SIZE})
    plan = UNPRUNED if text is None else SelectionSchedule.parse(text)
    return forward_cost(config, 10, plan).macs(texts) / forward_cost(full, 10, UNPRUNED).macs(texts)


def gap(rows: list[Row], baseline: list[Row]) -> str:
    """Mean difference of test accuracies, its standard error, and p; empty below three seeds."""
    if (paired := paired_by_seed(rows, baseline, "test_accuracy")) is None:
        return ""
    found, p = paired
    return f"{found.mean:+.1f} ({found.standard_error:.1f}; {p})"


def protocol(source: str) -> str:
    """Accuracies by keep rate and score, and paired differences. Columns without a cell are left out."""
    runs = variants(read(source))
    baseline = runs["unpruned"]
    rows = [["unpruned", "1.00", "1.00", *[spread(percents(baseline, "test_accuracy"))] * 3, *[""] * 5]]
    for rate, pixels in PROTOCOL_PIXELS.items():
        ways = (f"text {rate}", f"image {rate}", f"random {rate}", f"fewer pixels {pixels}")
        text, image, random, fewer = (runs.get(way, []) for way in ways)
        macs = (protocol_macs(PROTOCOL_SIZE, f"2:text:{rate}", texts) for texts in (1, 4))
        rows.append(
            [
                rate,
                *(f"{ratio:.2f}" for ratio in macs),
                *(spread(percents(of, "test_accuracy")) for of in (text, image, random)),
                f"{spread(percents(fewer, 'test_accuracy'))} ({pixels} px)" if fewer else "",
                *(gap(text, of) for of in (baseline, image, random, fewer)),
            ]
        )
    header = ["Keep rate", "MACs, 1 text", "MACs, 4 texts", "By the text, %", "By the image, %", "At random, %"]
    header += [
        "Fewer pixels, %",
        "Text less unpruned",
        "Text less image",
        "Text less random",
        "Text less fewer pixels",
    ]
    shown = [column for column in range(len(header)) if any(row[column] for row in rows[1:])]
    body = [[row[column] for column in shown] for row in rows]
    return render([header[column] for column in shown], body, source, note=f"{len(baseline)} independent starts")


TABLES["protocol_questions"] = partial(protocol, "protocol_questions")
TABLES["protocol_boxes"] = partial(protocol, "protocol_boxes")


@table
def protocol_no_regions() -> str:
    """The paper's signal alone, after the steps of the other tables and after six times as many."""
    rows, ways = [], ["unpruned", *(f"{way} 0.7" for way in GUIDANCES)]
    for source in ("protocol_questions", "protocol_no_regions"):
        runs = variants(read(source))
        unpruned, *scored = (runs.get(f"{way}, no regions", []) for way in ways)
        text, image, random = scored
        rows.append(
            [
                f"{int(option(text[0], 'max_steps')[0]):,}",
                *(spread(percents(of, "test_accuracy")) for of in (unpruned, *scored)),
                *(gap(of, unpruned) for of in scored),
                *(gap(text, of) for of in (image, random)),
                *(spread(percents(of, "test_layer2_patch_precision")) for of in scored),
            ]
        )
    header = ["Steps", "Unpruned, %", "Text, %", "Image, %", "Random, %", "Text less unpruned", "Image less unpruned"]
    header += ["Random less unpruned", "Text less image", "Text less random"]
    header += [f"Precision, {way}, %" for way in GUIDANCES]
    return render(header, rows, "protocol_questions", "protocol_no_regions", note="keep rate 0.7")


@table
def protocol_precision() -> str:
    rows = []
    for task, source in PROTOCOL_TASKS.items():
        runs = variants(read(source))
        for rate in PROTOCOL_PIXELS:
            ways = [runs.get(f"{way} {rate}", []) for way in GUIDANCES]
            found = (spread(percents(of, f"test_layer2_{name}")) for name in FOUND for of in ways)
            rows.append([task, rate, *found])
    header = ["Task", "Keep rate", *(f"{found}, {way}, %" for found in ("Precision", "Recall") for way in GUIDANCES)]
    return render(header, rows, *PROTOCOL_TASKS.values(), note="with regions")


@table
def protocol_resolution() -> str:
    times, runs = read("protocol_questions_times"), [variants(read(source)) for source in PROTOCOL_TASKS.values()]
    names = {f"fewer pixels {side}": f"unpruned, {side} px" for side in (64, 72, 80)}
    rows = [
        [
            label,
            *(seconds(times, key, texts_per_image=texts) for texts in (1, 4)),
            *(
                cell
                for of in runs
                for cell in (spread(percents(of[key], "test_accuracy")), gap(of["text 0.05"], of[key]))
            ),
        ]
        for key, label in {**names, "text 0.05": "`2:text:0.05`, 96 px", "unpruned": "unpruned, 96 px"}.items()
    ]
    header = ["Model", "Time, 1 text", "Time, 4 texts", "Questions, %", "`2:text:0.05` less this"]
    header += ["Boxes, %", "`2:text:0.05` less this"]
    sources = [*PROTOCOL_TASKS.values(), "protocol_questions_times"]
    return render(header, rows, *sources, note="with regions; times of the questions")


@table
def protocol_top_p() -> str:
    names = {f"text {rate}": f"`2:text:{rate}`" for rate in ("0.05", "0.25", "0.5")}
    names |= {f"text top-p {mass}": f"top-p {mass}, at most half" for mass in ("0.9", "0.99")}
    rows = []
    for task, source in PROTOCOL_TASKS.items():
        runs = variants(read(source))
        for key, label in names.items():
            kinds = [spread(percents(runs[key], f"test_accuracy{kind}")) for kind in ("", "_shape", "_presence")]
            kept = f"{mean(row['test_layer2_kept'] for row in runs[key]):.1f}"
            rows.append([task, label, kept, *kinds, gap(runs[key], runs["unpruned"])])
    header = ["Task", "Selection", "Kept of 144 patches", "Accuracy, %", "Shape, %", "Presence, %", "Less unpruned"]
    return render(header, rows, *PROTOCOL_TASKS.values(), note="with regions")


@table
def protocol_fused_token() -> str:
    runs = variants(read("protocol_questions"))
    rows = []
    for rate in ("0.05", "0.25"):
        fused, dropped = runs[f"text {rate}"], runs[f"text {rate}, no fused token"]
        rows.append(
            [
                rate,
                *(spread(percents(of, "test_accuracy")) for of in (fused, dropped)),
                gap(fused, dropped),
                gap(dropped, runs["unpruned"]),
            ]
        )
    header = ["Keep rate", "With the fused token, %", "Without, %", "With less without", "Without less unpruned"]
    return render(header, rows, "protocol_questions", note="scored by the text, with regions")


@table
def protocol_images() -> str:
    """Boxes on drawn images: accuracy by kind of expression and size, and what was kept."""
    runs, times = variants(read("protocol_images")), read("protocol_images_times")
    rows = []
    for key, of in runs.items():
        groups = ("", *(f"_{group}" for group in ("name", "place", "size", "smallest")))
        text = [] if key == "unpruned" else runs.get(f"text {key.split()[-1]}", runs["text 0.25"])
        rows.append(
            [
                model_of(of[0]),
                *(seconds(times, key, texts_per_image=texts) for texts in (1, 4)),
                *(spread(percents(of, f"test_accuracy{group}")) for group in groups),
                *(spread(percents(of, f"test_layer9_{name}")) for name in FOUND),
                gap(of, runs["unpruned"]),
                gap(text, of),
            ]
        )
    header = ["Model", "Time, 1 text", "Time, 4 texts", "Accuracy, %", "Name", "Location", "Size", "Smallest third"]
    header += [*FOUND_HEADER, "Less unpruned", "Text at this time less this"]
    return render(header, rows, "protocol_images", "protocol_images_times", note="boxes, with regions")


# Real images


def start(row: Row) -> str:
    """Which of the two trained models a run started from."""
    return "second" if any(word.startswith("pictures/full/") for word in row["options"]) else "first"


THIRDS = {"smallest": "Smallest third", "medium": "Medium third", "largest": "Largest third"}


def real_images(names: list[str], groups: dict[str, str]) -> str:
    """Return a row for each run, in the order of the files, with the accuracy of each group of rows."""
    rows = [
        [
            method(row) + (", earlier loss" if "fused_token_counts" in row else ""),
            f"{start(row)}, {row['seed']}",
            f"{100 * row['eval_accuracy']:.1f}",
            *(f"{100 * row[field]:.1f}" if (field := f"eval_accuracy_{group}") in row else "" for group in groups),
            *(f"{100 * row[field]:.1f}" if (field := f"eval_layer9_{kind}") in row else "" for kind in FOUND),
        ]
        for name in names
        for row in read(name)
    ]
    header = ["Selection", "Start, seed", "Accuracy, %", *groups.values(), *FOUND_HEADER]
    return render(header, rows, *names, note="one run per line")


TABLES["real_images_boxes"] = partial(
    real_images,
    ["pictures_grounding", "pictures_grounding_removed"],
    {"name": "Name", "place": "Location", "size": "Size", **THIRDS},
)
TABLES["real_images_questions"] = partial(
    real_images,
    ["pictures_vqa", "pictures_vqa_removed"],
    {group: group.capitalize() for group in ("color", "side", "presence", "count", "place", "size")} | THIRDS,
)


@table
def real_images_times() -> str:
    rows = []
    for task, name in (("grounding", "pictures_grounding_times"), ("questions", "pictures_vqa_times")):
        times = read(name)
        for variant in dict.fromkeys(row["checkpoint"].removesuffix("-seed0") for row in times):
            cells = [
                seconds(times, variant, f"{step}_seconds", texts_per_image=texts)
                for texts in (1, 4)
                for step in ("forward", "training")
            ]
            rows.append([task, variant.replace("-", " ").replace("taught", "with supervision"), *cells])
    header = ["Task", "Selection", "Forward, 1 text", "Training, 1 text", "Forward, 4 texts", "Training, 4 texts"]
    return render(header, rows, "pictures_grounding_times", "pictures_vqa_times", note="1 thread, processor time")


@table
def real_images_untrained() -> str:
    rows = [
        [
            row["selection_guidance"],
            row["keep_rate"],
            *(f"{100 * row[f'eval_layer7_{name}']:.1f}" for name in FOUND),
        ]
        for row in read("pictures_untrained")
    ]
    return render(["Scored by", "Keep rate", *FOUND_HEADER], rows, "pictures_untrained", note="no training")


@table
def real_images_retrieval() -> str:
    names = {"ridge": "ridge regression", "unpruned": "unpruned baseline"}
    rows = []
    for row in read("pictures_retrieval"):
        for prefix, by in (("", "features"), ("eval_features_", "features"), ("eval_", "reranked")):
            if f"{prefix}t2i_r1" in row:
                recalls = [100 * row[f"{prefix}{way}_r{k}"] for way in ("t2i", "i2t") for k in (1, 5, 10)]
                label = names.get(row["variant"], "`5:image:0.7,10:image:0.7,12:text:0.3`")
                rows.append([label, by, *(f"{recall:.1f}" for recall in recalls), f"{row['minutes']:.1f}"])
    ways = [f"{way} R@{k}, %" for way in ("Name to image,", "Image to name,") for k in (1, 5, 10)]
    return render(["Model", "Ranked by", *ways, "Minutes"], rows, "pictures_retrieval", note="single seed")


# Training


def task(name: str, field: str, scale: float, digits: int, header: str, supervised: bool = True) -> str:
    runs = variants(read(name))
    rows = [
        [
            method(of[0], supervised),
            *(f"{scale * value:.{digits}f}" for value in (row[field] for row in of)),
            spread([scale * row[field] for row in of], digits),
            difference(of, runs["unpruned"], field, scale, digits),
        ]
        for of in runs.values()
        if len(of) == 3
    ]
    seeds = [f"Seed {seed}" for seed in (0, 1, 2)]
    return render(["Selection", *seeds, header, "Difference to unpruned"], rows, name)


@table
def demo_runs() -> str:
    runs: dict[tuple, dict[int, Row]] = {}
    for row in sorted(read("demo_runs"), key=lambda row: (row["variant"], row["num_threads"], row["seed"])):
        runs.setdefault((row["variant"], row["num_threads"]), {})[row["seed"]] = row
    seeds = sorted({row["seed"] for row in read("demo_runs")})
    rows = [
        [
            precision,
            threads,
            *(f"{100 * of[seed]['test_accuracy']:.2f}" if seed in of else "" for seed in seeds),
        ]
        for (precision, threads), of in runs.items()
    ]
    header = ["Precision", "Threads", *(f"Seed {seed}, %" for seed in seeds)]
    return render(header, rows, "demo_runs")


TABLES |= {
    "captioning": partial(task, "scenes_captioning", "eval_cider", 1, 2, "CIDEr", supervised=False),
    "captioning_continued": partial(
        task, "scenes_captioning_continued", "eval_cider", 1, 2, "CIDEr", supervised=False
    ),
    "retrieval": partial(
        task, "scenes_retrieval", "eval_r_mean", 100, 1, "R-mean after reranking, %", supervised=False
    ),
    "retrieval_features": partial(
        task, "scenes_retrieval", "eval_features_r_mean", 100, 1, "R-mean of features, %", supervised=False
    ),
    "statements": partial(task, "statements", "eval_accuracy", 100, 1, "Accuracy, %"),
}


@table
def pretraining() -> str:
    runs = variants(read("scenes_pretraining"))
    fields = {
        "i2t R@1, %": "eval_features_i2t_r1",
        "t2i R@1, %": "eval_features_t2i_r1",
        "ITM, %": "eval_itm_accuracy",
        "MLM, %": "eval_mlm_accuracy",
        "PrefixLM, %": "eval_prefix_lm_accuracy",
    }
    rows = [
        [
            method(of[0], supervised=False),
            ", ".join(str(row["seed"]) for row in of),
            *(spread(percents(of, field)) for field in fields.values()),
            spread([row["minutes"] for row in of]),
        ]
        for of in runs.values()
    ]
    default = next(of for of in runs.values() if len(of) == 3 and of is not runs["unpruned"])
    gaps = [difference(default, runs["unpruned"], field) for field in fields.values()]
    rows.append(["second line less the first, paired by seed", "0, 1, 2", *gaps, ""])
    return render(["Selection", "Seeds", *fields, "Minutes"], rows, "scenes_pretraining")


# Speed


def ratio(row: Row) -> str:
    return f"{row['macs_ratio']:.2f}, {row['time_ratio']:.2f}"


@table
def machines() -> str:
    files = sorted(path.stem for path in (RESULTS / "hardware").glob("*.json"))
    cells: dict[tuple, dict[str, Row]] = {}
    for name in files:
        for row in read(f"hardware/{name}"):
            setting = row["mode"], row["image_size"], row["batch_size"], row["texts_per_image"], schedule_of(row)
            cells.setdefault(setting, {})[name] = row
    rows = [
        [mode, f"{size} px", batch, texts, selection, f"{next(iter(row.values()))['macs_ratio']:.2f}"]
        + [f"{row[name]['time_ratio']:.2f} ({row[name]['throughput']:.1f})" if name in row else "" for name in files]
        for (mode, size, batch, texts, selection), row in sorted(cells.items())
    ]
    header = ["Step", "Image", "Batch", "Texts per image", "Schedule", "MAC ratio"]
    header += [f"Time ratio, {name.replace('_', ' ')}" for name in files]
    return render(
        header,
        rows,
        *(f"hardware/{name}" for name in files),
        note="base size, random weights, float32; in brackets texts per second",
    )


@table
def dtypes() -> str:
    cells: dict[tuple, dict] = {}
    for row in [*read("speed_bf16_base_cpu"), *read("speed_float32_base_cpu")]:
        setting = row["dtype"], row["mode"], row["image_size"], schedule_of(row)
        cells.setdefault(setting, {"macs": row["macs_ratio"]})[row["compile"]] = row
    rows = []
    for (dtype, mode, size, selection), found in cells.items():
        eager = found.get(False)
        memory = eager["peak_memory_bytes"] / eager["unpruned_peak_memory_bytes"] if eager else None
        times = [f"{found[compiled]['time_ratio']:.2f}" if compiled in found else "" for compiled in (False, True)]
        rows.append([dtype, mode, f"{size} px", selection, f"{found['macs']:.2f}", *times])
        rows[-1].append(f"{memory:.2f}" if memory else "")
    header = ["Type", "Step", "Image", "Schedule", "MAC ratio", "Time, eager", "Time, compiled", "Peak memory, eager"]
    return render(header, rows, "speed_bf16_base_cpu", "speed_float32_base_cpu", note="base size, random weights")


@table
def texts_per_image() -> str:
    runs: dict[tuple, dict[int, Row]] = {}
    for row in read("cost_by_texts_base_cpu"):
        runs.setdefault((schedule_of(row), row["batch_size"]), {})[row["texts_per_image"]] = row
    counts = (1, 2, 5, 10)
    rows = [
        [
            selection,
            batch,
            of[1]["tokens_per_layer"][-1],
            *(ratio(of[count]) if count in of else "" for count in counts),
        ]
        for (selection, batch), of in runs.items()
    ]
    header = ["Schedule", "Batch", "Tokens to fusion (unpruned: 577)", *(f"{count} texts" for count in counts)]
    return render(header, rows, "cost_by_texts_base_cpu", note="each cell: MAC ratio, time ratio")


@table
def tiny() -> str:
    rows = [
        [row["mode"], row["batch_size"], row["texts_per_image"], *ratio(row).split(", ")]
        for row in read("speed_tiny_cpu")
    ]
    note = "MAC ratios of four texts are of an earlier way of counting; today's code gives 1.17"
    return render(["Step", "Batch", "Texts per image", "MAC ratio", "Time ratio"], rows, "speed_tiny_cpu", note=note)


PEERS = {
    "blip": "BLIP base",
    "blip-shared": "BLIP base, one image pass for all texts",
    "vilt-32": "ViLT B/32",
    "vilt-16": "ViLT with patches of 16 pixels",
    "bridgetower": "BridgeTower base",
    "timm-vit": "timm ViT-B/16",
}


def peer(name: str) -> str:
    """The label of a model in the rows; schedules in today's form."""
    if name.startswith("TRIPS, ") and " x " in name:
        layers = []
        for part in name.removeprefix("TRIPS, ").split("; "):
            numbers, guide, rate = re.fullmatch(r"([\d, ]+) (\w+) x ([\d.]+)", part).groups()
            layers += [f"{layer}:{guide}:{rate}" for layer in numbers.split(", ")]
        return f"TRIPS, `{','.join(layers)}`"
    base, comma, rest = name.removesuffix("-match").replace("-match-", "-").partition(", ")
    return PEERS.get(base, base) + comma + rest


def peers(name: str) -> str:
    runs: dict[str, dict[tuple, Row]] = {}
    for row in read(name):
        runs.setdefault(peer(row["model"]), {})[row["task"], row["texts_per_image"]] = row
    settings = list(dict.fromkeys((row["task"], row["texts_per_image"]) for row in read(name)))
    shared = runs["BLIP base, one image pass for all texts"]

    def cell(row: Row | None, setting: tuple) -> str:
        if row is None:
            return ""
        over = shared[setting]["throughput"] if setting in shared else runs["timm ViT-B/16"][setting]["throughput"]
        return f"{row['throughput']:.2f} ({row['throughput'] / over:.2f}, {row['speedup']:.2f})"

    rows = [[model, *(cell(of.get(setting), setting) for setting in settings)] for model, of in runs.items()]
    words = {"answer": "Questions", "match": "Pairs", "tower": "Images"}
    header = ["Model", *(f"{words[task]}/s, {texts} per image" for task, texts in settings)]
    header = [title.replace("Images/s, 1 per image", "Images/s, tower alone") for title in header]
    return render(header, rows, name, note="random weights, 384 px, 1 thread, processor time")


TABLES["peers"] = partial(peers, "peers_base_cpu")
TABLES["peers_ten_questions"] = partial(peers, "peers_ten_questions_base_cpu")


@table
def growth() -> str:
    rows = [
        [
            row["axis"],
            row["value"],
            f"`{peer('TRIPS, ' + row['schedule']).partition('`')[2]}",
            f"{row['macs'] / 1e9:.1f}",
            f"{row['macs'] / row['unpruned_macs']:.2f}",
            f"{row['latency']:.2f}" if row["latency"] else "not measured",
            f"{row['latency'] / row['unpruned_latency']:.2f}" if row["unpruned_latency"] else "",
        ]
        for row in read("cost_growth_base_cpu")
    ]
    header = ["What grows", "Value", "Schedule", "GMACs", "MAC ratio", "Seconds", "Time ratio"]
    return render(header, rows, "cost_growth_base_cpu", note="base size, 1 thread, processor time")


@table
def patched_models() -> str:
    rows = [
        [
            f"`{row['host']}`",
            f"`{schedule(row['selection_layers'], [row['keep_rate']], [row['guidance']])}`",
            f"{row['unpruned_image_tokens']} -> {row['image_tokens']}",
            f"{row['unpruned_macs'] / row['batch_size'] / 1e9:.1f} -> {row['macs'] / row['batch_size'] / 1e9:.1f}",
            f"{row['macs_ratio']:.2f}",
            f"{row['time_ratio']:.2f} ({row['time_ratio_quartiles'][0]:.2f} to {row['time_ratio_quartiles'][1]:.2f})",
            f"{100 * (row['time_ratio'] / row['macs_ratio'] - 1):+.1f}",
        ]
        for row in read("hosts_base_cpu")
    ]
    header = ["Model", "Schedule", "Image tokens", "GMACs per pair", "MAC ratio", "Time ratio (middle half)"]
    header += ["Time over MACs, %"]
    return render(header, rows, "hosts_base_cpu", note="random weights, 384 px, 1 thread, processor time")


WAYS = {"eager": "PyTorch", "compiled": "PyTorch, `torch.compile`", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
TYPES = {"fp32": "`float32`", "bf16": "`bfloat16`", "int8": "`int8`"}


@table
def export() -> str:
    runs: dict[str, dict[str, Row]] = {}
    for row in read("export_base_cpu"):
        runs.setdefault(row["way"], {})[row["task"]] = row
    rows = []
    for way, of in sorted(runs.items(), key=lambda run: run[1]["answer"]["speedup"]):
        engine, dtype, *calibrated = way.split("-")
        speedups = [f"{of[name]['speedup']:.2f}" for name in ("answer", "match", "features")]
        label = f"{WAYS[engine]}, {TYPES[dtype]}{', calibrated' if calibrated else ''}"
        rows.append([label, *speedups, f"{100 * of['answer']['same_patches']:.1f}"])
    header = ["Engine and precision", "Answers of 2 tokens", "Matching", "Features", "Same kept patches, %"]
    return render(header, rows, "export_base_cpu", note="random weights, 384 px, 1 thread, processor time")


@table
def pretraining_step() -> str:
    (row,) = read("pretraining_step_base_cpu")
    forward = sum(row["macs_by_part"].values())
    rows = [
        [
            part,
            *(f"{100 * row[f'{of}macs_by_part'].get(part, 0) / forward:.0f}" for of in ("", "unpruned_")),
        ]
        for part in row["macs_by_part"]
    ]
    rows.append(["all, MAC ratio", f"{row['macs_ratio']:.2f}", "1"])
    rows.append(["all, time ratio", f"{row['time_ratio']:.2f}", "1"])
    header = ["Part of the forward pass", f"{schedule_of(row)}, % of its MACs", "Unpruned, % of the same number"]
    return render(header, rows, "pretraining_step_base_cpu", note="base size, random weights, 256 px")


@table
def service() -> str:
    rows = [
        [
            "base size, random weights" if "base" in run["options"].get("checkpoint", "") else "shipped, 64 px",
            row["clients"],
            row["requests"],
            f"{row['requests_per_second']:.1f}",
            row["p50_ms"],
            row["p99_ms"],
            row["failures"],
            f"{run['memory_after'] / 1e6:.0f}" if run.get("memory_after") else "",
        ]
        for run in read("load_cpu")
        for row in run.get("rows", [])
    ]
    header = ["Checkpoint", "Clients", "Requests", "Requests/s", "p50, ms", "p99, ms", "Failures", "MB after"]
    return render(header, rows, "load_cpu", note="AMD EPYC, a machine that did other work")


@table
def indexing() -> str:
    def part(name: str) -> list[Row]:
        return select(read("index_cpu"), part=name)

    (search,), (vectors,) = part("search"), part("vectors")
    rows = [
        [f"images per second, actors: {row['num_actors']}, round {row['round']}", f"{row['images_per_second']:.0f}"]
        for row in part("actors")
    ]
    rows += [[f"peak memory of {row['images']:,} images", f"{row['peak_mb']:,.0f} MB"] for row in part("memory")]
    rows += [
        ["R@1 by features", f"{100 * search['r1_by_features']:.1f} %"],
        *([f"R@1, {k} reranked", f"{100 * search[f'r1_reranked_{k}']:.1f} %"] for k in (10, 50)),
        ["recall of the index, 50 nearest of 1,000", f"{100 * search['index_recall_at_50']:.0f} %"],
        ["features of a text", f"{search['text_features_ms']:.1f} ms"],
        ["exact search, 1,000 images", f"{search['exact_search_ms']:.1f} ms"],
        ["search by the index, 1,000 images", f"{search['index_search_ms']:.1f} ms"],
        *([f"reranking {k}", f"{search[f'rerank_{k}_ms']:.0f} ms"] for k in (10, 50)),
        ["a million vectors of 256 numbers: build of IVF_PQ", f"{vectors['build_ms'] / 1000:.0f} s"],
        ["the same: bytes per vector, table", f"{vectors['table_bytes_per_vector']:.0f}"],
        ["the same: bytes per vector, index", f"{vectors['index_bytes_per_vector']:.0f}"],
        ["the same: exact search", f"{vectors['exact_ms']:.0f} ms"],
        *(
            [
                f"the same: partitions searched: {probes}",
                f"recall {100 * vectors[f'recall_at_50_of_{probes}_probes']:.1f} % "
                f"in {vectors[f'index_{probes}_ms']:.1f} ms",
            ]
            for probes in (1, 5, 20, 50)
        ),
    ]
    return render(["What", "Measured"], rows, "index_cpu", note="tiny preset, 64 px, 1 thread per actor")


# Summaries


MACHINES = (
    "hardware/amd_epyc_1_thread",
    "hardware/intel_xeon_2_threads",
    "speed_bf16_base_cpu",
    "speed_float32_base_cpu",
)


@table
def real_images_paired() -> str:
    rows = []
    for name, task_name, starts in (
        ("pictures_grounding", "grounding", ("first", "second")),
        ("pictures_vqa", "questions", ("second",)),
    ):
        known = [row for row in read(name) if "fused_token_counts" not in row and start(row) in starts]
        runs = {key: {(start(row), row["seed"]): row for row in of} for key, of in variants(known).items()}
        for rate in ("0.25", "0.5"):
            text = runs[f"text, taught {rate}"]
            for other in ("unpruned", f"image {rate}", f"text, untaught {rate}", f"random {rate}"):
                pairs = [(row, runs[other][key]) for key, row in text.items() if key in runs.get(other, {})]
                if not pairs:
                    continue
                results = [[100 * row["eval_accuracy"] for row in side] for side in zip(*pairs)]
                gap = paired_difference(*results)
                cells = [
                    ", ".join(f"{one - other:+.1f}" for one, other in zip(*results)),
                    f"{gap.mean:+.1f}",
                    f"{gap.p_value:.2f}" if gap.count > 2 else "too few runs",
                ]
                rows.append([task_name, method(pairs[0][0]), method(pairs[0][1]), *cells])
    header = ["Task", "Selection", "Less", "By run, points", "Mean", "p, paired t-test"]
    return render(header, rows, "pictures_grounding", "pictures_vqa")


@table
def shared_image() -> str:
    (row,) = read("shared_prefix_base_cpu")
    cells = [schedule_of(row), row["texts_per_image"], f"{row['speedup_over_repeating_images']:.2f}"]
    rows = [[*cells, f"{1 / row['time_ratio']:.2f}", f"{row['macs_ratio']:.2f}"]]
    header = [
        "Schedule",
        "Texts",
        "Speedup over one image pass per text",
        "Speedup over unpruned that shares",
        "MAC ratio",
    ]
    note = "base size, random weights, 384 px; the MAC ratio is of an earlier way of counting, today's code gives 2.95"
    return render(header, rows, "shared_prefix_base_cpu", note=note)


@table
def paper_speed() -> str:
    known = [row for name in MACHINES for row in read(name) if row["selection_layers"] == [5, 10]]
    rows = []
    for mode, words in (("forward", "forward pass"), ("training", "training step")):
        for size in (224, 384):
            of = select(known, mode=mode, image_size=size)
            times = sorted(row["time_ratio"] for row in of)
            cells = [f"{times[0]:.2f} to {times[-1]:.2f}", f"{1 / times[-1]:.2f} to {1 / times[0]:.2f}", len(times)]
            rows.append([f"{size} px, {words}", f"{of[0]['macs_ratio']:.2f}", *cells])
    note = "CPUs of 2 cores, float32 and bfloat16, eager and compiled"
    return render(["Step", "MAC ratio", "Time ratio", "Speedup", "Measurements"], rows, *MACHINES, note=note)


@table
def speed_summary() -> str:
    known = [row for name in MACHINES for row in read(name) if row["image_size"] == 384]
    rows = []
    for mode in ("forward", "training"):
        of = select(known, mode=mode, selection_layers=[5, 10])
        times = sorted(row["time_ratio"] for row in of)
        cells = [schedule_of(of[0]), f"{of[0]['macs_ratio']:.2f}", f"{times[0]:.2f} to {times[-1]:.2f}"]
        rows.append([f"{mode}, 1 text per image", *cells])
    for texts in (1, 10):
        for row in select(read("cost_by_texts_base_cpu"), texts_per_image=texts, batch_size=1):
            rows.append([f"forward, {texts} per image", schedule_of(row), *ratio(row).split(", ")])
    return render(["Step", "Schedule", "MAC ratio", "Time ratio"], rows, *MACHINES, "cost_by_texts_base_cpu")


@table
def vlm_cost() -> str:
    files = ("vlm_cost", "vlm_cost_batch_8")
    rows = [row for name in files for row in read(name) if "variant" in row]
    cells = []
    for row in rows:
        (unpruned,) = select(rows, shape=row["shape"], batch_size=row["batch_size"], variant="unpruned")
        first, later = row["seconds_to_first_token"], row["seconds_per_token"]
        cells.append(
            [
                f"`{row['shape']}`",
                row["batch_size"],
                row["variant"],
                f"{row['visual_tokens']} to {row['cached_tokens'] - row['text_length']}",
                f"{first / unpruned['seconds_to_first_token']:.2f}",
                f"{row['ratio_to_exit']:.2f}",
                # Of a tower with a language model of one layer, the next token takes no time that can be measured.
                "" if row["shape"].endswith("_tower") else f"{later / unpruned['seconds_per_token']:.2f}",
                f"{row['cache_bytes'] / 1e6:.2f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f}" if row["peak_memory_bytes"] else "",
            ]
        )
    header = ["Shape", "Batch", "Variant", "Visual tokens", "First token, of unpruned", "First token, of exit alone"]
    header += ["Next token, of unpruned", "KV cache, MB", "Peak memory, MB"]
    return render(header, cells, *files)


@table
def vlm_choices() -> str:
    rows = [row for row in read("vlm_cost") if "choice" in row]
    cells = [[row["choice"], f"{row['milliseconds']:.2f}"] for row in rows]
    return render(["Choice of 64 tokens", "Milliseconds"], cells, "vlm_cost")


@table
def headline() -> str:
    def compared(what: str, name: str, *ways: str) -> list[list[str]]:
        runs, times = variants(read(f"protocol_{name}")), read(f"protocol_{name}_times")
        suffix = ", no regions" if name == "no_regions" else ""
        baseline, known = f"unpruned{suffix}", "without" if suffix else "with"
        rows = []
        for variant in (f"{way}{suffix}" for way in ways):
            times_of = (seconds(times, variant, baseline=baseline, texts_per_image=texts) for texts in (1, 4))
            accuracies = (spread(percents(runs[key], "test_accuracy")) for key in (variant, baseline))
            label = f"{model_of(runs[variant][0])}, {known} regions"
            rows.append([what, label, *accuracies, ", ".join(f"{1 / float(time):.2f}x" for time in times_of)])
        return rows

    def base(words: str, rows: list[Row]) -> list[str]:
        speedups = sorted(1 / row["time_ratio"] for row in rows)
        return [f"base, 384 px: {words}", schedule_of(rows[0]), "", "", f"{speedups[0]:.2f}x to {speedups[-1]:.2f}x"]

    paper = {"image_size": 384, "selection_layers": [5, 10]}
    single = [row for name in MACHINES for row in select(read(name), **paper)]
    ten = ("shared_prefix_base_cpu", "cost_by_texts_base_cpu")
    several = [row for name in ten for row in select(read(name), texts_per_image=10, **paper)]
    scenes = "tiny, 96 px: {}, scenes of 16"
    rows = [
        *compared(
            scenes.format("questions"), "questions", "text 0.05", "image 0.05", "random 0.05", "fewer pixels 80"
        ),
        *compared(scenes.format("questions"), "no_regions", "text 0.7", "image 0.7", "random 0.7"),
        *compared(scenes.format("boxes"), "boxes", "text 0.05", "image 0.05", "fewer pixels 80"),
        *compared("small, 112 px: boxes, drawn images", "images", "text 0.25", "image 0.25", "fewer pixels 98"),
        base("forward pass, 1 text per image", select(single, mode="forward")),
        base("training step, 1 text per image", select(single, mode="training")),
        base("forward pass, 10 texts per image", several),
    ]
    tasks = ("questions", "no_regions", "boxes", "images")
    sources = [f"protocol_{name}{times}" for name in tasks for times in ("", "_times")]
    sources += [*MACHINES, *ten]
    header = ["Model and task", "Schedule", "Accuracy, %", "Unpruned baseline, %", "Measured speedup"]
    return render(header, rows, *sources)


# Busy scenes: a small generative model

VLM_GUIDE = "TextGuide from regions, tower"
VLM_KINDS = ("color", "shape", "place", "presence")
# The names of rows whose selection has no parameters of its own begin so.
VLM_UNTRAINED = ("random", "pooling", "image", "max-min", "prompt", "FastV", "fewer pixels")


def vlm_rows() -> dict[tuple[str, int], list[Row]]:
    """Rows of the test split by name and number of visual tokens, one per seed."""
    rows = select(read("vlm_scenes"), split="test")
    keys = dict.fromkeys((row["name"], row["kept"]) for row in rows)
    return {key: select(rows, name=key[0], kept=key[1]) for key in keys}


def vlm_render(header: list[str], body: list[list]) -> str:
    rows = select(read("vlm_scenes"), split="test", name="unpruned")
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else "single seed, indicative only"
    return render(header, body, "vlm_scenes", note=f"{seeds}, {rows[0]['questions']} test questions each")


def vlm_average(rows: list[Row], field: str) -> float:
    return mean(row[field] for row in rows)


@table
def vlm_accuracy() -> str:
    rows, numbers, sides = vlm_rows(), (72, 36, 16, 9), (8, 6, 4, 3)
    unpruned = spread(percents(rows["unpruned", 144], "accuracy"))
    body = [["unpruned", *[unpruned] * len(numbers)]]
    for name in dict.fromkeys(name for name, _ in rows):
        places = [side * side for side in sides] if name == "fewer pixels" else numbers
        if all((name, number) in rows for number in places):
            body.append([name, *(spread(percents(rows[name, number], "accuracy")) for number in places)])
    head = ["Selection", "1/2: 72 tokens, %", "1/4: 36 tokens, %", "1/9: 16 tokens, %", "1/16: 9 tokens, %"]
    return vlm_render(head, body)


def vlm_costs(kept: int) -> str:
    rows = vlm_rows()
    body = [
        [
            name,
            spread(percents(of, "accuracy")),
            *(spread(percents(of, f"accuracy_{kind}")) for kind in VLM_KINDS),
            *(f"{vlm_average(of, f'{part}_mmacs'):.0f}" for part in ("tower", "prefill", "decoding", "total")),
            f"{vlm_average(of, 'kv_bytes') / 1024:.0f}",
        ]
        for (name, number), of in rows.items()
        if number in (kept, 144)
    ]
    parts = ["Tower, MMACs", "Prefill, MMACs", "Decoding, MMACs", "Total, MMACs", "KV cache, KiB"]
    return vlm_render(["Selection", "Accuracy, %", *(f"{kind.capitalize()}, %" for kind in VLM_KINDS), *parts], body)


TABLES["vlm_costs_16"] = partial(vlm_costs, 16)
TABLES["vlm_costs_9"] = partial(vlm_costs, 9)


def correct_answers(row: Row) -> list[bool]:
    return [bit == "1" for bit in f"{int(row['correct'], 16):0{row['questions']}b}"]


def mcnemar(rows: list[Row], others: list[Row]) -> list[str]:
    """Questions that one way alone or the other alone answers, over all seeds, and the exact two-sided p."""
    by_seed = {row["seed"]: correct_answers(row) for row in others}
    pairs = [pair for row in rows for pair in zip(correct_answers(row), by_seed[row["seed"]], strict=True)]
    one, other = pairs.count((True, False)), pairs.count((False, True))
    p = exact_sign_test(one, other)
    return [f"{one} : {other}", f"{p:.3f}" if p >= 0.001 else "< 0.001"]


@table
def vlm_equal_cost() -> str:
    rows, body = vlm_rows(), []
    for kept in (16, 9):
        guide = rows[VLM_GUIDE, kept]
        limit = 1.001 * vlm_average(guide, "total_mmacs")
        within = sorted(
            (key for key, of in rows.items() if vlm_average(of, "total_mmacs") <= limit),
            key=lambda key: -vlm_average(rows[key], "accuracy"),
        )
        untrained = [key for key in within if key[0].startswith(VLM_UNTRAINED) and "fine-tuned" not in key[0]][:4]
        tuned = [key for key in within if "fine-tuned" in key[0]][:1]
        guides = [key for key in rows if key[1] == kept and key[0].startswith("TextGuide")]
        dearer = [(name, kept) for name in ("max-min diversity, exit", "prompt and diversity, exit", "FastV")]
        for key in [*guides, *untrained, *tuned, *dearer, ("unpruned", 144)]:
            of = rows[key]
            body.append(
                [
                    f"{key[0]}, {key[1]} tokens",
                    spread(percents(of, "accuracy")),
                    f"{vlm_average(of, 'total_mmacs'):.0f}",
                    *(
                        ["", "", ""]
                        if key == (VLM_GUIDE, kept)
                        else [difference(guide, of, "accuracy"), *mcnemar(guide, of)]
                    ),
                ]
            )
    head = [
        "Selection",
        "Accuracy, %",
        "Total, MMACs",
        "Lead of the guide from regions, points",
        "Alone correct",
        "p (McNemar)",
    ]
    return vlm_render(head, body)


@table
def vlm_times() -> str:
    body = [
        [
            f"{row['name']}, {row['kept']} tokens",
            *(f"{row[f'{part}_ms']:.1f}" for part in ("tower", "prefill", "decoding")),
            f"{row['tower_ms'] + row['prefill_ms']:.1f}",
            f"{row['total_mmacs']:.0f}",
        ]
        for row in read("vlm_scenes_times")
    ]
    head = ["Selection", "Tower, ms", "Prefill, ms", "One decoding step, ms", "Tower and prefill, ms", "Total, MMACs"]
    return render(head, body, "vlm_scenes_times")


# Documents


def documents() -> list[Path]:
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def rewrite(path: Path) -> str:
    """The text of a document with its tables made anew."""
    results = os.path.relpath(RESULTS, path.parent)

    def fill(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"{path} asks for the table {name!r}, which docs/tables.py does not make.")
        return f"<!-- table: {name} -->\n\n{TABLES[name]().replace('{results}', results)}\n\n<!-- end -->"

    return TABLE.sub(fill, path.read_text(encoding="utf-8"))


def outdated() -> list[Path]:
    """The documents whose tables are not those of the rows."""
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
