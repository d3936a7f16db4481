r"""
Publish a trained model on the Hub: weights, processor, code and a model card, in one commit.

    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-scenes --dry_run   # sends nothing
    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-scenes --dry_run --output_dir published
    hf auth login
    python examples/push_to_hub.py --model demo/model --repo_id ada/trips-scenes --license mit --language en
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from trips_examples.data.source import option
from trips_examples.training.checks import why_offline
from trips_examples.training.options import make_parser, run_script


FACTS = ("license", "language", "datasets", "eval_dataset", "command")  # for the model card


@dataclass
class PublishArguments:
    model: str = option(MISSING, "Folder of a trained model and its processor.")
    repo_id: str = option(MISSING, "Repository: user/name or organization/name.")
    private: bool = option(False, "Create a private repository.")
    with_handler: bool = option(False, "Add the handler.py that Inference Endpoints run.")
    output_dir: str | None = option(None, "New or empty folder for the files. Default: a temporary one.")
    dry_run: bool = option(False, "Show the files and the card without uploading them.")
    license: str | None = option(None, "License of the weights, as in apache-2.0.")
    language: list[str] | None = option(None, "ISO 639 codes of the texts, as in en.")
    datasets: list[str] | None = option(None, "Training data; an id on the Hub becomes a link.")
    eval_dataset: str | None = option(None, "Evaluation data.")
    command: str | None = option(None, "Command that trained the model.")

    def __post_init__(self):
        if self.repo_id.count("/") != 1:
            raise ValueError(f"--repo_id {self.repo_id}: give the owner and the name, as in ada/trips-scenes.")

    def check_files(self):
        """Raise an `OSError` if the Hub is to be written to and does not answer."""
        if not self.dry_run and why_offline():
            raise OSError(f"--repo_id {self.repo_id}: {why_offline()}. --dry_run --output_dir writes the files here.")


OPTIONS = make_parser(PublishArguments, description=__doc__, script=__name__)

import tempfile

from modeling_trips.publishing import build_repository, publish


def main(argv: list[str] | None = None) -> str | None:
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    facts = {name: getattr(args, name) for name in FACTS}
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(args.output_dir or temporary)
        files = build_repository(target, Path(args.model), args.repo_id, args.with_handler, **facts)
        total = 0
        for path in files:
            size = path.stat().st_size
            total += size
            print(f"{size:>15,}  {path.relative_to(target).as_posix()}")
        print(f"{total:>15,}  bytes in all\n")
        if args.dry_run:
            print((target / "README.md").read_text(encoding="utf-8"))
            print(f"Dry run: nothing was sent to {args.repo_id}.")
            return None
        address = publish(target, args.repo_id, args.private)
    print(f"Published: {address}")
    return address


if __name__ == "__main__":
    run_script(main)
