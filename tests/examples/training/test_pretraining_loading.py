"""Start of pre-training: streams, a vision tower and a text encoder, and errors."""

import datasets
import pytest
from datasets import Dataset
from toy_pairs import command, encoded, make_tokenizer

from modeling_trips import TripsConfig, TripsProcessor
from trips_examples import run_pretraining
from trips_examples.training.options import PairArguments
from trips_examples.training.pretraining import OBJECTIVES, load_pairs
from trips_examples.training.runs import TripsTrainingArguments


TINY = TripsConfig.from_preset("tiny")


def test_a_streamed_data_set_has_splits(tmp_path, monkeypatch):
    """A local folder replaces a data set on the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation"):
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        pairs = {"image": [{"bytes": encoded("red"), "path": None}], "caption": [split]}
        Dataset.from_dict(pairs, features=features).to_parquet(tmp_path / "pairs" / f"{split}-0.parquet")
    args = TripsTrainingArguments(output_dir=str(tmp_path / "out"), max_steps=1, do_eval=False, use_cpu=True)
    for split in (None, "validation"):
        source = PairArguments(dataset_name=str(tmp_path / "pairs"), train_split=split, streaming=True)
        processor = TripsProcessor(tokenizer=make_tokenizer(), patch_size=8)
        data = load_pairs(source, args, TINY, processor)
        assert next(iter(data["train"]))["caption"] == (split or "train")


def test_missing_objectives_and_tokenizer_raise(files, stream, tmp_path):
    off = [f"--{name}=0" for name in OBJECTIVES]
    with pytest.raises(ValueError, match="itc_weight"):
        run_pretraining.main(command(files, tmp_path, *off)[1:])
    without = [option for option in stream if "tokenizer" not in option]
    with pytest.raises(ValueError, match="--tokenizer"):
        run_pretraining.main(command(without, tmp_path, "--max_steps=1")[1:])


@pytest.mark.parametrize(
    "options, named",
    [
        (["--train_shards=a.tar"], "--max_steps"),
        (["--train_shards=a.tar", "--max_steps=1"], "--validation_file"),
        (["--train_shards=a.tar", "--max_steps=1", "--do_eval=False"], "a.tar.*--train_shards"),
        (["--train_shards=a.tar", "--train_file=b.jsonl"], "--train_shards.*--train_file"),
        (["--streaming"], "--dataset_name"),
        (["--vision_model_name_or_path=a", "--text_model_name_or_path=b", "--model=c"], "--model"),
    ],
)
def test_conflicting_options_raise(options, named, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        run_pretraining.main([*options, f"--output_dir={tmp_path}"])
