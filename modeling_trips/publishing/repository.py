"""Hub repository of a trained model: its folder, and the upload."""

import re
import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

import modeling_trips

from ..inspection.checkpoints import load_checkpoint, load_processor
from ..inspection.files import whole_folder
from .model_card import HEADS, make_model_card


WEIGHTS_AND_CODE = r"[^/]+\.py|model[^/]*\.safetensors(\.index\.json)?"
# Handler of Inference Endpoints, and the file that it loads.
HANDLER = ("publishing/handler.py", "untrusted_images/slow_files.py")


def build_repository(target: Path, folder: Path, repo_id: str, with_handler: bool = False, **facts) -> list[Path]:
    """
    Write a repository into a folder, which is whole or absent: weights, configuration, processor, code and model card.

    Args:
        target (`Path`): A new or empty folder.
        folder (`Path`): Folder of a model and its processor. The card shows the metrics of its `test_results.json`,
            else of its `eval_results.json`.
        repo_id (`str`): Repository that the card's code loads the checkpoint from, as in `"ada/trips-scenes"`.
        with_handler (`bool`, *optional*, defaults to `False`): Add the `handler.py` of Inference Endpoints.
        facts: Facts for the card that the folder does not have, see [`make_model_card`].

    Returns:
        `list[Path]`: The written files, sorted.

    Raises:
        OSError: `target` is not empty, or `folder` has no model or processor.
        ValueError: The model is incomplete or exported; the handler does not support its head; or a written file
            refers to code of others.
    """
    model = load_checkpoint(folder, [getattr(modeling_trips, name) for name in HEADS], use_safetensors=True)
    processor = load_processor(folder, model.config)
    if with_handler and model.pipeline_class is None:
        raise ValueError(f"Inference Endpoints need a model with a pipeline, got {type(model).__name__}.")
    candidates = (folder / "test_results.json", folder / "eval_results.json")
    results = next((path for path in candidates if path.is_file()), None)
    card = make_model_card(model, processor, repo_id, results, with_handler=with_handler, **facts)
    processor.tokenizer.backend_tokenizer.no_padding()  # the last batch's
    for name in ("is_local", "local_files_only"):  # of this machine
        processor.tokenizer.init_kwargs.pop(name, None)
    with whole_folder(target) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        for name in HANDLER if with_handler else ():
            shutil.copy(Path(modeling_trips.__file__).parent / name, partial)
        card.save(partial / "README.md")
        check_code(partial)
    return sorted(path for path in target.rglob("*") if path.is_file())


def check_code(folder: Path):
    """Raise a `ValueError` if a configuration in a folder names code of another project."""
    for path in folder.rglob("*config.json"):
        content = path.read_text(encoding="utf-8")
        if found := re.search(r'"[\w./-]+--[\w.]+"|"custom_generate"', content):
            raise ValueError(f"{path.relative_to(folder)} must name code of this project alone, got {found[0]}.")


def publish(folder: Path, repo_id: str, private: bool = False) -> str:
    """
    Upload a folder of `build_repository` in one commit, and return the address of the commit. Weights and code of an
    earlier version that are not part of this one are deleted; other files stay.

    Raises:
        ValueError: `private` is set and the repository exists and is public. Nothing is uploaded.
        huggingface_hub.errors.HfHubHTTPError: The Hub rejects the request.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    before = api.model_info(repo_id)
    if private and not before.private:
        raise ValueError(f"--private: {repo_id} exists and is public. Run `hf repos settings {repo_id} --private`.")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names_before = {file.rfilename for file in before.siblings}
    outdated = [name for name in names_before - files.keys() if re.fullmatch(WEIGHTS_AND_CODE, name)]
    changes: list = [CommitOperationDelete(name) for name in sorted(outdated)]
    for name, path in files.items():
        changes.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path))
    # `upload_folder` may make several commits.
    commit = api.create_commit(repo_id, changes, commit_message="Publish model", parent_commit=before.sha)
    return commit.commit_url
