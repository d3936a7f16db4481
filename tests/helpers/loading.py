"""`load_task_dataset` with fields as keyword arguments, and writing of records in each format."""

import csv
import json

import datasets

from trips_examples.data.loading import DataArguments, load_task_dataset


def load(task, dataset_name=None, seed=0, **source):
    return load_task_dataset(task, DataArguments(dataset_name, **source), seed=seed)


def write(file, records):
    """Write records in the format of the file's suffix: lists as JSON in CSV, numbers as text in Parquet."""
    columns = list(dict.fromkeys(column for record in records for column in record))
    if file.suffix == ".json":
        file.write_text(json.dumps(records, indent=1))
    elif file.suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, columns)
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in records)
    else:
        texts = [{k: v if isinstance(v, list) or v is None else str(v) for k, v in r.items()} for r in records]
        datasets.Dataset.from_dict({c: [r.get(c) for r in texts] for c in columns}).to_parquet(file)
    return file


def read(file):
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def encoded(path):
    return {"bytes": path.read_bytes(), "path": path.name}
