"""
Publish a trained model on the Hub: weights, processor, code and a model card, in one commit.

    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-easy-vqa --dry_run   # sends nothing
    hf auth login
    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-easy-vqa --private --tag v1.0 \
        --license mit --language en --datasets easy-VQA --eval_split test
"""

import json
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from transformers import HfArgumentParser

import modeling_trips
from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor
from modeling_trips.publishing.model_card import CardArguments, make_model_card


# All that a published model consists of; nothing else leaves this machine.
PUBLISHED = (
    "README.md",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*.py",
)


@dataclass
class PublishArguments:
    model: str = field(metadata={"help": "Folder of a trained model and its processor."})
    repo_id: str = field(metadata={"help": "Where to publish it: user/name or organization/name."})
    private: bool = field(default=False, metadata={"help": "Only you and your organization see it."})
    revision: str = field(default="main", metadata={"help": "Branch to publish to."})
    tag: str | None = field(default=None, metadata={"help": "Tag that the published commit gets, as in v1.0."})
    commit_message: str = field(default="Publish model", metadata={"help": "Title of the commit."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show the files and the card, and send nothing. Needs no network."}
    )

    def __post_init__(self):
        if self.repo_id.count("/") != 1:
            raise ValueError(f"--repo_id {self.repo_id}: give the owner and the name, as in ada/trips-easy-vqa.")


def load_model(folder: Path) -> TripsPreTrainedModel:
    """The model with the head that the folder's configuration names."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder that `save_pretrained` or a training wrote.")
    architecture = (json.loads((folder / "config.json").read_text()).get("architectures") or [None])[0]
    model_class = getattr(modeling_trips, architecture or "", None)
    if getattr(model_class, "config_class", None) is not TripsConfig:
        raise ValueError(f"{folder}/config.json is that of a {architecture}: only whole TRIPS models are published.")
    model, report = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(f"The weights in {folder} are not those of a {architecture}: {problem} {report[problem]}")
    return model


def load_processor(folder: Path) -> TripsProcessor:
    if not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} has no processor: save the one that it was trained with there (`save_pretrained`)."
        )
    return TripsProcessor.from_pretrained(folder)


def results_of(folder: Path, args: CardArguments) -> Path | None:
    """The file of measured metrics: the one given, or the one that training left in the folder."""
    if args.results is not None:
        return Path(args.results)
    default = folder / "eval_results.json"
    return default if default.is_file() else None


def build_repository(target: Path, args: PublishArguments, card_args: CardArguments) -> list[Path]:
    """Writes what is to be published into the empty folder `target`, afresh; returns the files."""
    folder = Path(args.model)
    model, processor = load_model(folder), load_processor(folder)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    card = make_model_card(
        model, processor, args.repo_id, card_args, results=results_of(folder, card_args), revision=args.revision
    )
    card.save(target / "README.md")
    files = sorted(path for path in target.rglob("*") if path.is_file())
    unknown = [str(path.relative_to(target)) for path in files if not is_published(str(path.relative_to(target)))]
    if unknown:
        raise ValueError(f"Saving the model and its processor wrote {unknown}, but only {PUBLISHED} are published.")
    return files


def is_published(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in PUBLISHED)


def publish(files: list[Path], args: PublishArguments) -> str:
    """
    Uploads the files in one commit, which either appears whole or not at all; returns its address.

    Files of an earlier version that are not part of this one are deleted in the same commit; what else there is in
    the repository stays.
    """
    if get_token() is None:
        raise ValueError("There is no token to publish with: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
    check_target(api, args)
    before = api.model_info(args.repo_id, revision=args.revision)
    names = {path.name for path in files}
    stale = [
        file.rfilename for file in before.siblings if is_published(file.rfilename) and file.rfilename not in names
    ]
    # `upload_folder` would split a long upload into several commits.
    commit = api.create_commit(
        args.repo_id,
        [CommitOperationAdd(path.name, path) for path in files] + [CommitOperationDelete(name) for name in stale],
        commit_message=args.commit_message,
        revision=args.revision,
        parent_commit=before.sha,
    )
    if args.tag is not None:
        api.create_tag(args.repo_id, tag=args.tag, revision=commit.oid)
    return commit.commit_url


def check_target(api: HfApi, args: PublishArguments):
    """Finds out before the upload what would make it end halfway, or in the open."""
    if args.private and not api.model_info(args.repo_id).private:
        raise ValueError(
            f"--private: {args.repo_id} exists and is public. Run `hf repos settings {args.repo_id} --private` first."
        )
    references = api.list_repo_refs(args.repo_id)
    if args.revision not in [reference.name for reference in references.branches]:
        raise ValueError(
            f"--revision {args.revision}: {args.repo_id} has no such branch. Run `hf repos branch create "
            f"{args.repo_id} {args.revision}` first."
        )
    if args.tag in [reference.name for reference in references.tags]:
        raise ValueError(
            f"--tag {args.tag}: {args.repo_id} has this tag, and tags do not move. Choose another name, or run "
            f"`hf repos tag delete {args.repo_id} {args.tag}` first."
        )


def show(files: list[Path]):
    for path in files:
        print(f"{path.stat().st_size:>15,}  {path.name}")
    print(f"{sum(path.stat().st_size for path in files):>15,}  bytes in all\n")


def main(argv: list[str] | None = None) -> str | None:
    parser = HfArgumentParser((PublishArguments, CardArguments), description=__doc__)
    args, card_args = parser.parse_args_into_dataclasses(args=argv)
    with tempfile.TemporaryDirectory() as target:
        files = build_repository(Path(target), args, card_args)
        show(files)
        if args.dry_run:
            print((Path(target) / "README.md").read_text(encoding="utf-8"))
            print(f"Dry run: nothing was sent to {args.repo_id}.")
            return None
        address = publish(files, args)
    print(f"Published: {address}")
    return address


if __name__ == "__main__":
    main()
