"""All kinds of bad rows by task: the record and its reason."""

import json
from typing import NamedTuple

from PIL import Image
from strange_pictures import noise
from tiny_processors import make_bert_tokenizer


PATCH_SIZE = 8
WORDS = ["what color is it? red two dogs on grass left both are the dog"]
GOOD = {
    "vqa": {"image": "good.png", "question": "what color is it?", "answer": "red"},
    "captions": {"image": "good.png", "caption": "two dogs on grass"},
    "nlvr2": {"images": ["good.png", "good.jpg"], "statement": "both are red", "label": True},
    "grounding": {"image": "good.png", "expression": "the dog", "box": [4, 4, 20, 20]},
}
TEXT = {"vqa": "question", "captions": "caption", "nlvr2": "statement", "grounding": "expression"}


class BadRow(NamedTuple):
    """A record or an invalid line, the reason, and the step that finds it: `"reading"` or the `"tokenizer"`."""

    record: dict | str
    reason: str
    found: str = "reading"

    @property
    def line(self):
        return self.record if isinstance(self.record, str) else json.dumps(self.record)


def write_images(folder):
    for name in ("good.png", "good.jpg", "cut.jpg", "cut.gif", "cut.tiff", "cut.png", "cut.webp"):
        noise(40, 32).save(folder / name)
    for path in folder.glob("cut.*"):
        path.write_bytes(path.read_bytes()[:-200])
    flipped = bytearray((folder / "good.png").read_bytes())
    flipped[-40] ^= 1
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "text.png").write_text("no image")
    (folder / "folder.png").mkdir()
    Image.new("RGB", (640, PATCH_SIZE - 1)).save(folder / "banner.png")
    Image.new("F", (40, 32)).save(folder / "mode_f.tiff")


def bad_rows(task):
    def with_image(image):
        return {**GOOD[task], **({"images": ["good.png", image]} if task == "nlvr2" else {"image": image})}

    images = [BadRow(with_image(image), reason) for reason, images in _IMAGES.items() for image in images]
    changed = [BadRow({**GOOD[task], **fields}, *expected) for fields, *expected in _CHANGES[task]]
    return [*_LINES, *images, *_bad_texts(task), *changed, *_OTHERS.get(task, [])]


_LINES = [
    BadRow('{"image": "good.png", "question', "broken JSON"),
    BadRow("[" * 100_000, "broken JSON"),
    BadRow('{"image": "good.png", "image": "good.jpg"}', "broken JSON"),
    BadRow("3", "not a JSON object"),
]
_CUT = [f"cut.{suffix}" for suffix in ("png", "jpg", "webp", "gif", "tiff")]
_IMAGES = {
    "no image": [None, ""],
    "image is not text": [{"url": "x"}],
    "missing image": ["none.png", "\x1b[2J.png", {"bytes": None, "path": "none.png"}],
    "not a regular file": ["folder.png"],
    "image is too long": ["x" * 1_000_000],
    "unreadable image": ["nul\0.png", "text.png", "flipped.png", *_CUT],
    "image smaller than a patch": ["banner.png"],
    "image without a fixed range of grey values": ["mode_f.tiff"],
}


def _bad_texts(task):
    text = TEXT[task]
    name = "a caption" if task == "captions" else text
    kinds = [
        (None, f"no {text}", "reading"),
        (" \n", f"no {text}", "reading"),
        ("\u200b", f"no {text}", "reading"),
        (float("nan"), f"no {text}", "reading"),
        (True, f"{name} is not text", "reading"),
        ({"0": "a"}, f"{name} is not text", "reading"),
        ("half a \ud83d", f"{name} is not valid Unicode", "reading"),
        ("red " * 30_000, f"{name} is too long", "reading"),
        ("\ufffd", f"{text} without tokens", "tokenizer"),
        ("red " * 63, "more than 64 tokens", "tokenizer"),
    ]
    missing = BadRow({name: value for name, value in GOOD[task].items() if name != text}, f"no {text}")
    return [missing, *(BadRow({**GOOD[task], text: value}, *expected) for value, *expected in kinds)]


# What is changed in the good row, the reason, and the step if it is not reading.
_CHANGES = {
    "vqa": [
        ({"answer": [" ", ""]}, "no answer"),
        ({"answers": [["red"]]}, "an answer is not text"),
        ({"answers": "['red']"}, "answers is not a JSON list"),
        ({"answers": "[" * 50_000}, "answers is not a JSON list"),
        ({"answers": ["red", "\ufffd"]}, "answers without tokens", "tokenizer"),
        ({"answers": ["red", "red " * 64]}, "more than 64 tokens", "tokenizer"),
        ({"question_id": {"a": 1}}, "question_id is not text"),
        ({"image_id": ["a"]}, "image_id is not text"),
    ],
    "captions": [
        ({"captions": ["two dogs", " "]}, "an empty caption"),
        ({"captions": "[two dogs"}, "captions is not a JSON list"),
        ({"captions": {"raw": "two"}}, "captions is not a list"),
    ],
    "nlvr2": [
        ({"images": ["good.png"]}, "not two images"),
        ({"images": 5}, "images is not a list"),
        ({"image_ids": ["x"]}, "not 2 image_ids"),
        ({"image_ids": ["x", "x"]}, "image_id of two images"),
        ({"label": None}, "no label"),
        ({"label": 2}, "label is not 1, 0, true or false"),
        ({"label": [1]}, "label is not text"),
    ],
    "grounding": [
        ({"box": None}, "no box"),
        ({"box": 5}, "box is not four numbers"),
        ({"box": [0, 0, 1]}, "box is not four numbers"),
        ({"box": [True, 0, 9, 9]}, "box is not four numbers"),
        ({"box": [0, 0, "nan", 1]}, "box is not four numbers"),
        ({"box": [2, 0, 2, 1]}, "box without area"),
        ({"box": [40, 0, 40.5, 30]}, "box outside the image"),
    ],
}
_OTHERS = {  # without a column
    "vqa": [BadRow({"image": "good.png", "question": "what?"}, "no answer")],
    "nlvr2": [BadRow({"left_image": "good.png", "statement": "red", "label": 1}, "no image")],
}


def tokenizer():
    """Return a tokenizer for which some of the texts above have no tokens."""
    return make_bert_tokenizer(WORDS, model_max_length=64)
