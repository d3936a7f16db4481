"""Hub repository of a trained model: its folder, and the upload in one commit."""

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

import modeling_trips
from modeling_trips import TripsProcessor

from ..inspection.checkpoints import is_exported, load_checkpoint
from ..inspection.files import whole_folder
from .model_card import HEADS, CardArguments, make_model_card


# Only these files of a model are published.
PUBLISHED = (
    *("README.md", "config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "*.py"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
)
CODE_FIELDS = ("auto_map", "custom_pipelines", "custom_generate")  # fields of JSON files that name code
PACKAGE = Path(modeling_trips.__file__).parent
# Handler of Inference Endpoints, and the file that it loads.
HANDLER = (PACKAGE / "publishing" / "handler.py", PACKAGE / "untrusted_images" / "slow_files.py")


def build_repository(
    target: Path, folder: Path, repo_id: str, card_args: CardArguments, with_handler: bool = False
) -> list[Path]:
    """
    Write a repository into a folder, which is whole or absent: weights, configuration, processor, code and model card.

    Args:
        target (`Path`): A new or empty folder.
        folder (`Path`):
            Folder of a model and its processor. The card shows the metrics of its `test_results.json`, else of its
            `eval_results.json`, else of its model card.
        repo_id (`str`): Repository that the card's code loads the checkpoint from, as in `"ada/trips-scenes"`.
        card_args (`CardArguments`): Facts for the card that the folder does not have.
        with_handler (`bool`, *optional*, defaults to `False`): Add the `handler.py` of Inference Endpoints.

    Returns:
        `list[Path]`: The written files, sorted.

    Raises:
        ValueError: `target` is not empty; `folder` has no processor or no complete TRIPS model; the handler does not
            support the head; a written file is not on the list of published files or refers to foreign code; or the
            file of results has no metric.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty. Give a new or empty folder.")
    for name in ("config.json", "processor_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}. Give a folder written by a training.")
    if is_exported(folder):
        raise ValueError(f"{folder} is an exported model. Give the checkpoint that it was exported from.")
    model = load_checkpoint(folder, [getattr(modeling_trips, name) for name in HEADS], use_safetensors=True)
    processor = TripsProcessor.from_pretrained(folder)
    if with_handler and not HEADS[type(model).__name__].has_pipeline:
        raise ValueError(f"Inference Endpoints need a model with a pipeline, got {type(model).__name__}.")
    results = next((path for split in ("test", "eval") if (path := folder / f"{split}_results.json").is_file()), None)
    readme = folder / "README.md"
    former = ModelCard.load(readme, ignore_metadata_errors=True) if readme.is_file() else None
    card = make_model_card(model, processor, repo_id, card_args, results, former, with_handler=with_handler)
    with whole_folder(target) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        for path in HANDLER if with_handler else ():
            shutil.copyfile(path, partial / path.name)
        card.save(partial / "README.md")
        names = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()]
        if unknown := [name for name in names if not _is_published(name)]:
            raise ValueError(f"Only {PUBLISHED} are published, but the model or its processor has {unknown}.")
        check_code(partial)
    return sorted(target / name for name in names)


def check_code(folder: Path):
    """
    Check that a folder has and names only code of this project.

    Raises:
        ValueError: A Python file differs from that of this project, or a JSON file names code outside the folder.
    """
    handler = {path.name: path for path in HANDLER}
    for path in folder.rglob("*.py"):
        own = handler.get(path.name, PACKAGE / path.name)
        if path.parent != folder or not own.is_file() or path.read_bytes() != own.read_bytes():
            raise ValueError(f"{path.relative_to(folder)} differs from the file of this project. Remove it.")
    for path in folder.rglob("*.json"):
        for field, reference in _code_references(json.loads(path.read_text(encoding="utf-8"))):
            module = re.fullmatch(r"(\w+)\.\w+", reference)
            if not (module and (folder / f"{module[1]}.py").is_file()):
                raise ValueError(
                    f"{path.relative_to(folder)}: `{field}` must name code of this project, got {reference!r:.200}."
                )


def _code_references(content, field: str | None = None):
    """Yield the strings below the fields that name code, with the field. Of a pipeline, only `impl` names code."""
    if isinstance(content, str) and field:
        yield field, content
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        if not (field == "custom_pipelines" and key in ("pt", "type")):
            yield from _code_references(value, field or (key if key in CODE_FIELDS else None))


def publish(folder: Path, repo_id: str, private: bool = False) -> str:
    """
    Upload a folder of `build_repository` in one atomic commit, and return the address of the commit.

    A repository that does not exist is created, private if `private` is set. The commit deletes files of an earlier
    version that are not part of this one, and keeps other files.

    Raises:
        ValueError: `private` is set and the repository is public. Nothing is uploaded.
        huggingface_hub.errors.HfHubHTTPError: The Hub rejects the request.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    before = api.model_info(repo_id)
    if private and not before.private:
        raise ValueError(f"--private: {repo_id} exists and is public. Run `hf repos settings {repo_id} --private`.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = {file.rfilename for file in before.siblings if _is_published(file.rfilename)} - files.keys()
    # `upload_folder` may split the upload into several commits.
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, path) for name, path in files.items()]
        + [CommitOperationDelete(name) for name in sorted(stale)],
        commit_message="Publish model",
        parent_commit=before.sha,
    )
    return commit.commit_url


def _is_published(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in PUBLISHED)
