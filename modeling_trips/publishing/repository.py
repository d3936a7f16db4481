"""Hub repository of a trained model: its folder, and the upload in one commit."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

import modeling_trips
from modeling_trips import TripsPreTrainedModel, TripsProcessor

from ..inspection.checkpoints import load_checkpoint
from ..inspection.exports import is_exported
from .eval_results import write_eval_results
from .model_card import HEADS, CardArguments, code_of, make_model_card
from .sentence_transformers import check_kind, prepare, write_modules


# Only these files of a model are published.
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
    # For Sentence Transformers
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Dense/config.json",
    "1_Dense/model.safetensors",
    # Results, for the Hub
    ".eval_results/*.yaml",
)
CODE_FIELDS = ("auto_map", "custom_pipelines", "custom_generate")  # fields of JSON files that name code
# Handler of Inference Endpoints with the file that it loads, and the heads that it supports.
HANDLER = (Path(__file__).with_name("handler.py"), Path(__file__).parents[1] / "untrusted_images" / "slow_files.py")
HANDLED = ("TripsForConditionalGeneration", "TripsForQuestionAnswering", "TripsForRetrieval")


def build_repository(
    target: Path,
    folder: Path,
    repo_id: str,
    card_args: CardArguments,
    revision: str = "main",
    sentence_transformers: str | None = None,
    with_handler: bool = False,
) -> list[Path]:
    """
    Write a repository into a folder: weights, configuration, processor, code and a model card.

    Args:
        target (`Path`): A new or empty folder to write into.
        folder (`Path`): Folder of a model and its processor. The card shows the metrics of its `eval_results.json`.
        repo_id (`str`): Repository that the card's code loads the checkpoint from, as in `"ada/trips-easy-vqa"`.
        card_args (`CardArguments`): Facts for the card that the model does not have.
        revision (`str`, *optional*, defaults to `"main"`): Branch that the card's code loads from.
        sentence_transformers (`str`, *optional*):
            `"SentenceTransformer"` or `"CrossEncoder"`: add the files of Sentence Transformers for a
            [`TripsForRetrieval`].
        with_handler (`bool`, *optional*, defaults to `False`): Add the `handler.py` of Inference Endpoints.

    Returns:
        `list[Path]`: The written files, sorted.

    Raises:
        ValueError: `target` is not empty; `folder` has no processor or no complete TRIPS model; the head does not fit
            Sentence Transformers or Inference Endpoints, if requested; a written file is not on the list of published
            files or refers to foreign code; or as `make_model_card` raises.
    """
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise ValueError(f"{target} is not empty. Give a new or empty folder.")
    model, processor = _load_model(folder), _load_processor(folder)
    if sentence_transformers is not None:
        check_kind(model, sentence_transformers)
        prepare(model, processor, sentence_transformers)
        write_modules(target, sentence_transformers)
    if with_handler:
        if type(model).__name__ not in HANDLED:
            raise ValueError(f"Inference Endpoints support {', '.join(HANDLED)}, got {type(model).__name__}.")
        for path in HANDLER:
            shutil.copyfile(path, target / path.name)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    results = results_of(folder, card_args)
    card = make_model_card(
        model,
        processor,
        repo_id,
        card_args,
        results=results,
        revision=revision,
        sentence_transformers=sentence_transformers,
        with_handler=with_handler,
    )
    card.save(target / "README.md")
    if results is not None:
        write_eval_results(target, results, card_args)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    names = [path.relative_to(target).as_posix() for path in files]
    unknown = [name for name in names if not _is_published(name)]
    if unknown:
        raise ValueError(f"Saving the model and its processor wrote {unknown}, but only {PUBLISHED} are published.")
    check_code(target, model)
    return files


def check_code(folder: Path, model: TripsPreTrainedModel):
    """
    Check that a folder has and names only code of this project.

    Raises:
        ValueError: A Python file differs from that of this project, or a JSON file refers to other code.
    """
    own = {path.name: path for path in [*code_of(type(model)), *HANDLER]}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name not in own or path.read_bytes() != own[name].read_bytes():
            raise ValueError(f"{name} differs from the file of this project. Remove it.")
    for path in sorted(folder.rglob("*.json")):
        for field, name, reference in _code_references(json.loads(path.read_text(encoding="utf-8"))):
            known = {"AutoProcessor": "processing_trips.TripsProcessor"} | (
                getattr(model.config, field.rpartition(".")[2], {})
            )
            if known.get(name) != reference:
                raise ValueError(
                    f"{path.relative_to(folder).as_posix()}: `{field}` must only refer to code of this project, got "
                    f"{name!r}: {reference!r:.200}."
                )


def _code_references(fields, place: str = ""):
    """Yield the field, name and value of each entry of a JSON file that names code."""
    if isinstance(fields, list):
        fields = dict(enumerate(fields))
    if not isinstance(fields, dict):
        return
    for name, value in fields.items():
        inner = f"{place}.{name}" if place else str(name)
        if name in CODE_FIELDS:
            entries = value if isinstance(value, dict) else {None: value}
            yield from ((inner, key, reference) for key, reference in entries.items())
        else:
            yield from _code_references(value, inner)


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = "main",
    tag: str | None = None,
    commit_message: str = "Publish model",
) -> str:
    """
    Upload a folder in one atomic commit, and create the repository if needed.

    The commit deletes files of an earlier version that are not part of this one, and keeps other files.

    Args:
        folder (`Path`): As `build_repository` writes it.
        repo_id (`str`): Repository, as in `"ada/trips-easy-vqa"`.
        private (`bool`, *optional*, defaults to `False`): Make the repository private.
        revision (`str`, *optional*, defaults to `"main"`): Branch, which must exist.
        tag (`str`, *optional*): New tag of the commit.
        commit_message (`str`, *optional*, defaults to `"Publish model"`): Title of the commit.

    Returns:
        `str`: The address of the commit.

    Raises:
        ValueError: `private` is set and the repository is public, or the tag exists. Nothing is uploaded.
        huggingface_hub.errors.HfHubHTTPError: The Hub rejects the request.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    before = api.model_info(repo_id, revision=revision)
    if private and not before.private:
        raise ValueError(f"--private: {repo_id} exists and is public. Run `hf repos settings {repo_id} --private`.")
    if tag in [reference.name for reference in api.list_repo_refs(repo_id).tags]:
        raise ValueError(f"--tag {tag}: {repo_id} already has this tag. Choose another one.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = {file.rfilename for file in before.siblings if _is_published(file.rfilename)} - files.keys()
    # `upload_folder` may split the upload into several commits.
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, path) for name, path in files.items()]
        + [CommitOperationDelete(name) for name in sorted(stale)],
        commit_message=commit_message,
        revision=revision,
        parent_commit=before.sha,
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.commit_url


def _load_model(folder: Path) -> TripsPreTrainedModel:
    """Load the model with the head that the folder's configuration names."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json. Give a folder written by `save_pretrained` or a training.")
    if is_exported(folder):
        raise ValueError(f"{folder} is an exported model. Give the checkpoint that it was exported from.")
    heads = [getattr(modeling_trips, name) for name in HEADS]
    return load_checkpoint(folder, heads, use_safetensors=True)


def _load_processor(folder: Path) -> TripsProcessor:
    if not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder} has no processor_config.json. Save the model's processor there.")
    return TripsProcessor.from_pretrained(folder)


def results_of(folder: Path, args: CardArguments) -> Path | None:
    """Return the file of metrics: the given one, else `test_results.json` or `eval_results.json` of the folder."""
    if args.results is not None:
        return Path(args.results)
    defaults = (folder / f"{split}_results.json" for split in ("test", "eval"))
    return next((path for path in defaults if path.is_file()), None)


def _is_published(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUBLISHED)
