"""
Train on named images with pretrained towers, using only PyPI and Debian: make the towers and a list of images; train
retrieval of names, then grounding and question answering in composed scenes, as unpruned baseline and with patches
scored by the text or by the image; and draw a page.

    python examples/pictures.py            # the command of `make pictures`
    python examples/pictures.py --quick    # a short run on few scenes; its numbers are meaningless
    python examples/pictures.py --prepare  # makes the towers and the list of emoji, and stops

Finished parts with the same options are skipped, so start it again after an interruption. The images are Noto's emoji
and openclipart's drawings from Debian packages. Installed packages are used; otherwise apt-get and dpkg-deb unpack
them into the folder, without root.
"""

import trips_examples  # noqa: F401  # isort: skip

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from trips_examples.data.emoji import write_emoji
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser, run_script


PACKAGES = ("fonts-noto-color-emoji", "openclipart-png", "unicode-cldr-core")
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = "usr/share/unicode/cldr/common/annotations/en.xml"
DRAWINGS = "usr/share/openclipart/png"
# Folders of openclipart with objects, without flags, icons and patterns.
SUBJECTS = (
    "animals buildings containers decorations education electronics food office people plants recreation science "
    "tools transportation"
).split()

RECIPE = (
    "--freeze_vision_layers 6 --learning_rate 3e-4 --tower_learning_rate 1e-4 --per_device_train_batch_size 64 "
    "--skip_bad_rows True --save_strategy no --logging_steps 20 --disable_tqdm True"
).split()
NAMES = "--dataset_name pictures --scene_size 84 --keep_rate 1.0".split()
SCENES = "--dataset_name picture_scenes --scene_size 112 --attention_loss_weight 2".split()
SELECTION = ["--selection_layers", "9", "--keep_rate", "0.25"]
VARIANTS = {
    "unpruned": ["--keep_rate", "1.0"],
    "text": [*SELECTION, "--selection_guidance", "text", "--selection_loss_weight", "4"],
    "image": [*SELECTION, "--selection_guidance", "image"],
}
# Kinds of questions that the model can learn: without unseen names and comparisons of two objects.
TASKS = {"grounding": [], "vqa": ["--question_kinds", "side", "count", "presence", "color"]}
STARTS = {"grounding": "names", "vqa": "grounding-start"}
LONG = {
    "grounding": "--train_scenes 24000 --validation_scenes 800 --max_steps 1200".split(),
    "vqa": "--train_scenes 24000 --validation_scenes 300 --max_steps 750".split(),
}
SHORT = {
    "grounding": "--train_scenes 3600 --validation_scenes 800 --num_train_epochs 1 --seed 0".split(),
    "vqa": "--train_scenes 1600 --validation_scenes 600 --num_train_epochs 1 --seed 0".split(),
}
QUICK = "--train_scenes 60 --validation_scenes 20 --num_train_epochs 1".split()


@dataclass
class PicturesArguments:
    output_dir: str = field(default="pictures", metadata={"help": "Folder for all results."})
    quick: bool = field(default=False, metadata={"help": "Train on few scenes, as a test run."})
    prepare: bool = field(default=False, metadata={"help": "Make the towers and the list of emoji, and stop."})
    pictures: list[str] | None = field(
        default=None, metadata={"help": "Folders and files of your own named images, in place of Debian's."}
    )


@dataclass(frozen=True)
class Part:
    """A command and its result file."""

    name: str
    result: Path
    module: str
    options: list[str]

    def run(self, log: Path):
        """Run the command in a separate process, with a log."""
        command = [sys.executable, "-m", f"trips_examples.{self.module}", *self.options]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if status != 0 or not self.result.exists():
            raise RuntimeError(f"{self.name} failed with status {status}, see {log}.")


def debian_files(folder: Path) -> Path:
    """Return the root folder of the packages' files: `/` if they are installed, or the folder they are unpacked to."""
    for root in (Path("/"), folder):
        if all((root / file).exists() for file in (FONT, ANNOTATIONS, DRAWINGS)):
            return root
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"The Debian packages {', '.join(PACKAGES)} cannot be fetched ({error}). Install them or use --pictures."
        ) from error
    return folder


def picture_lists(folder: Path) -> list[str]:
    """Return Noto's emoji, written to `folder` if they are missing, and openclipart's folders of objects."""
    root, emoji = debian_files(folder / "debian"), folder / "emoji"
    if not emoji.exists():
        print(f"{write_emoji(root / FONT, root / ANNOTATIONS, emoji)} emoji with names: {emoji}")
    return [str(emoji / "pictures.jsonl"), *(str(root / DRAWINGS / subject) for subject in SUBJECTS)]


def towers_in(folder: Path) -> Part:
    return Part("towers", folder / "towers/minilm", "make_towers", ["--output_dir", str(folder / "towers")])


def trainings(folder: Path, made: Path, pictures: list[str], quick: bool) -> Iterator[Part]:
    """
    Yield the trainings: retrieval of names from the towers in `made`, then grounding, then question answering, all
    unpruned; each variant of selection from the latter two; and a page.
    """

    def part(name: str, script: str, data: list[str], *options: str) -> Part:
        output = folder / name
        everything = [*data, "--pictures", *pictures, *RECIPE, *options, "--output_dir", str(output)]
        return Part(f"{folder.name}/{name}", output / "eval_results.json", script, everything)

    def of_scenes(task: str, name: str, checkpoint: str, selection: list[str], length: list[str]) -> Part:
        options = ["--model_name_or_path", str(folder / checkpoint), *(QUICK if quick else length)]
        return part(f"{task}-{name}", f"run_{task}", SCENES, *options, *TASKS[task], *selection)

    towers = ["--vision_model_name_or_path", str(made / "towers/dinov2-small")]
    towers += ["--text_model_name_or_path", str(made / "towers/minilm"), "--num_fusion_layers", "2"]
    yield part("names", "run_retrieval", NAMES, *towers, "--num_train_epochs", "1" if quick else "24")
    for task, checkpoint in STARTS.items():
        yield of_scenes(task, "start", checkpoint, VARIANTS["unpruned"], LONG[task])
    for task, (variant, selection) in itertools.product(TASKS, VARIANTS.items()):
        yield of_scenes(task, variant, f"{task}-start", selection, SHORT[task])
    options = ["--model_name_or_path", str(folder / "grounding-text"), "--do_train", "False", "--num_pictures", "12"]
    yield part("page", "run_grounding", SCENES, "--train_scenes", "1", "--validation_scenes", "20", *options)


def table(folder: Path, ended: dict[str, dict]) -> str:
    """Return the accuracies as a Markdown table."""
    lines = ["| Selection | Grounding accuracy | Minutes | VQA accuracy | Minutes |", "|---|---|---|---|---|"]
    for variant in VARIANTS:
        cells = []
        for task in TASKS:
            result = json.loads((folder / f"{task}-{variant}/test_results.json").read_text())
            cells += [f"{result['test_accuracy']:.1%}", f"{ended[f'{folder.name}/{task}-{variant}']['minutes']:.1f}"]
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    (args,) = make_parser(PicturesArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    made = Path(args.output_dir)
    folder = made / "quick" if args.quick else made / "full"
    pictures = args.pictures or picture_lists(made)
    parts = [towers_in(made)]
    if not args.prepare:
        parts += trainings(folder, made, pictures, args.quick)
    done = made / "done.json"  # options and minutes of each finished part
    ended = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
    for part in (bar := tqdm(parts)):
        bar.set_description(part.name)
        if not part.result.exists() or ended.get(part.name, {}).get("options") != part.options:
            start = time.perf_counter()
            part.run(made / "logs" / f"{part.name}.txt")
            ended[part.name] = {"options": part.options, "minutes": (time.perf_counter() - start) / 60}
            write_json(done, ended)
    if args.prepare:
        print(f"Towers: {made / 'towers'}. Images: {' '.join(pictures)}")
        return
    if args.quick:
        print("This was a test run on few scenes. Its numbers are meaningless.")
    print(table(folder, ended))
    print(f"Test names and images do not occur in training. Predictions: {folder / 'page/predictions.png'}")


if __name__ == "__main__":
    run_script(main)
