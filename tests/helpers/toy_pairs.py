"""Toy pairs for pre-training: images of one color and captions that name it, with options of the script."""

import json

import strange_pictures
import torch
from archives import write_tar
from PIL import Image
from places import ROOT
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from trips_examples.data.vocabulary import train_tokenizer


SCRIPT = str(ROOT / "examples" / "run_pretraining.py")
COLORS = ["red", "blue", "green", "white", "black", "yellow"]
CAPTIONS = ["a {} picture", "all of it is {}", "{} from the left to the right"]
OPTIONS = [
    "--per_device_train_batch_size=6",
    "--per_device_eval_batch_size=9",
    "--learning_rate=1e-3",
    "--lr_scheduler_type=constant",
    "--queue_size=40",
    "--disable_tqdm=True",
]

# Any free port.
RENDEZVOUS = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node=2", *RENDEZVOUS]


def encoded(color):
    return strange_pictures.encoded(Image.new("RGB", (64, 64), color))


def make_tokenizer():
    return train_tokenizer([caption.format(color) for caption in CAPTIONS for color in COLORS])


def write_pairs(folder):
    """Write six images with three captions each as rows of a file and in three tar shards, and a tokenizer."""
    pairs = [(color, caption.format(color)) for color in COLORS for caption in CAPTIONS]
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(encoded(color))
    rows = [json.dumps({"image": f"{color}.png", "caption": caption}) for color, caption in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    for shard in range(3):
        files = {}
        for number, (color, caption) in enumerate(pairs[shard::3]):
            files[f"{shard}{number}.png"] = encoded(color)
            files[f"{shard}{number}.txt"] = caption.encode()
            files[f"{shard}{number}.json"] = json.dumps({"url": color}).encode()
        write_tar(folder / f"pairs-{shard}.tar", files)
    make_tokenizer().save_pretrained(folder / "tokenizer")


def file_options(folder):
    """Return the options to train and evaluate on the rows of `write_pairs`."""
    return [f"--train_file={folder / 'pairs.jsonl'}", f"--validation_file={folder / 'pairs.jsonl'}"]


def stream_options(folder):
    """Return the options to train on the shards of `write_pairs`."""
    return [
        f"--train_shards={folder}/pairs-{{0..2}}.tar",
        "--shuffle_buffer=4",
        f"--tokenizer={folder / 'tokenizer'}",
        "--do_eval=False",
    ]


def write_parts(folder):
    """Write an untrained ViT and BERT, and return their options."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    ViTModel(ViTConfig(num_hidden_layers=3, image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "vit")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder / "vit")
    text = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=40, **sizes)
    BertModel(text).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return [f"--vision_model_name_or_path={folder / 'vit'}", f"--text_model_name_or_path={folder / 'bert'}"]


def make_rows(count, caption="{} from the left to the right"):
    return [
        {
            "image": {"bytes": encoded(COLORS[number % 6]), "path": None},
            "image_id": COLORS[number % 6],
            "caption": caption.format(COLORS[number % 6]),
            "source": f"toy row {number}",
        }
        for number in range(count)
    ]


def command(data, output_dir, *options):
    return [SCRIPT, *data, *OPTIONS, f"--output_dir={output_dir}", *options]
