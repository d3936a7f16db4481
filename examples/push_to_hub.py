r"""
Publish a trained model on the Hub: weights, processor, code and a model card, in one commit.

    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-scenes --dry_run   # sends nothing
    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-scenes --dry_run --output_dir published
    hf auth login
    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-scenes --license mit --language en

The card names the data by the names of the training's files; --datasets and --eval_dataset name them otherwise.
"""

import trips_examples  # noqa: F401  # isort: skip

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from modeling_trips.publishing import CardArguments, build_repository, publish
from trips_examples.training.parser import make_parser, run_script


@dataclass
class PublishArguments:
    model: str = field(metadata={"help": "Folder of a trained model and its processor."})
    repo_id: str = field(metadata={"help": "Repository: user/name or organization/name."})
    private: bool = field(default=False, metadata={"help": "Create a private repository."})
    with_handler: bool = field(default=False, metadata={"help": "Add the handler.py that Inference Endpoints run."})
    output_dir: str | None = field(
        default=None, metadata={"help": "New or empty folder for the files. Default: a temporary one."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Show the files and the card without uploading them."})

    def __post_init__(self):
        if self.repo_id.count("/") != 1:
            raise ValueError(f"--repo_id {self.repo_id}: give the owner and the name, as in ada/trips-scenes.")


def main(argv: list[str] | None = None) -> str | None:
    parser = make_parser(PublishArguments, CardArguments, description=__doc__)
    args, card_args = parser.parse_args_into_dataclasses(args=argv)
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(args.output_dir or temporary)
        files = build_repository(target, Path(args.model), args.repo_id, card_args, args.with_handler)
        for path in files:
            print(f"{path.stat().st_size:>15,}  {path.relative_to(target).as_posix()}")
        print(f"{sum(path.stat().st_size for path in files):>15,}  bytes in all\n")
        if args.dry_run:
            print((target / "README.md").read_text(encoding="utf-8"))
            print(f"Dry run: nothing was sent to {args.repo_id}.")
            return None
        address = publish(target, args.repo_id, args.private)
    print(f"Published: {address}")
    return address


if __name__ == "__main__":
    run_script(main)
