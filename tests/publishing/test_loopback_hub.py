"""The real `huggingface_hub` client against `tests/loopback_hub.py`: what the tests of publishing build on."""

import hashlib

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub


SMALL = b'{"model_type": "trips"}\n'
LARGE = bytes(range(256)) * 400  # binary, so it goes to LFS
REPO = "ada/model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(users={"hf_ada": "ada", "hf_bob": "bob"}) as hub:
        hub.connect(monkeypatch, tmp_path / "home", token="hf_ada")
        yield hub


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


def commit(api: HfApi, title: str, **options):
    files = {"config.json": SMALL, "model.safetensors": LARGE, "code/a.py": b"pass\n"}
    return api.create_commit(
        REPO, [CommitOperationAdd(*item) for item in files.items()], commit_message=title, **options
    )


def test_files_come_back_bit_for_bit(api, hub):
    assert api.whoami()["name"] == "ada"
    api.create_repo(REPO)
    info = commit(api, "first")
    assert sorted(api.list_repo_files(REPO)) == [".gitattributes", "code/a.py", "config.json", "model.safetensors"]
    for name, content in (("config.json", SMALL), ("model.safetensors", LARGE)):
        path = hf_hub_download(REPO, name)
        assert open(path, "rb").read() == content
        assert info.oid in path  # the cache files it under the commit
    assert hub.large_files == {hashlib.sha256(LARGE).hexdigest(): LARGE}
    assert list(hub.repositories[REPO].titles.values()) == ["initial commit", "first"]


def test_the_tree_lists_files_and_sizes(api):
    api.create_repo(REPO)
    commit(api, "first")
    top = {entry.path: entry for entry in api.list_repo_tree(REPO)}
    assert top.keys() == {".gitattributes", "code/a.py", "config.json", "model.safetensors"}
    assert top["model.safetensors"].size == len(LARGE)
    assert [entry.path for entry in api.list_repo_tree(REPO, "code")] == ["code/a.py"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))


def test_commits_tags_and_branches_keep_what_they_point_to(api):
    api.create_repo(REPO)
    first = commit(api, "first").oid
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="next")
    operations = [CommitOperationAdd("config.json", b"{}"), CommitOperationDelete("model.safetensors")]
    second = api.create_commit(REPO, operations, commit_message="second", revision="next").oid
    for revision in ("main", "v1", first):
        assert api.model_info(REPO, revision=revision).sha == first
        assert open(hf_hub_download(REPO, "config.json", revision=revision), "rb").read() == SMALL
    assert open(hf_hub_download(REPO, "config.json", revision="next"), "rb").read() == b"{}"
    assert "model.safetensors" not in api.list_repo_files(REPO, revision="next")
    references = api.list_repo_refs(REPO)
    assert {item.name: item.target_commit for item in references.branches} == {"main": first, "next": second}
    assert {item.name: item.target_commit for item in references.tags} == {"v1": first}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1", revision="next")


def test_unchanged_files_are_not_sent_again(api, hub):
    api.create_repo(REPO)
    first = commit(api, "first").oid
    hub.requests.clear()
    assert commit(api, "again").oid == first
    assert not [line for line in hub.requests if "/commit/" in line or line.startswith("PUT")]


def test_what_is_missing_has_the_client_s_own_exceptions(api):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ada/nothing")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("ada/nothing", "config.json")
    api.create_repo(REPO)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        commit(api, "first", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "config.json")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    api.create_repo(REPO, exist_ok=True)


def test_a_private_repository_is_hidden_from_everyone_else(api):
    api.create_repo(REPO, private=True)
    commit(api, "first")
    assert api.model_info(REPO).private
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(REPO, token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, "model.safetensors", token=token)
    assert open(hf_hub_download(REPO, "model.safetensors"), "rb").read() == LARGE
    with pytest.raises(HfHubHTTPError, match="401"):
        api.model_info(REPO, token="hf_wrong")


def test_only_the_owner_writes(api):
    api.create_repo(REPO)
    assert not api.model_info(REPO, token=False).private
    with pytest.raises(HfHubHTTPError, match="403"):
        commit(api, "first", token="hf_bob")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("ada/other", token="hf_bob")


def test_a_commit_applies_whole_or_not_at_all(api, hub):
    api.create_repo(REPO)
    first = commit(api, "first").oid
    additions = [CommitOperationAdd("config.json", b"{}"), CommitOperationDelete("missing.json")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, additions, commit_message="half")
    with pytest.raises(HfHubHTTPError, match="412"):
        late = {"commit_message": "late", "parent_commit": next(iter(hub.repositories[REPO].commits))}
        api.create_commit(REPO, [CommitOperationAdd("config.json", b"{}")], **late)
    hub.refused = "PUT /store/"
    additions = [CommitOperationAdd("config.json", b"{}"), CommitOperationAdd("model.safetensors", LARGE[1:])]
    with pytest.raises(RuntimeError, match="uploading 'model.safetensors'"):
        api.create_commit(REPO, additions, commit_message="half")
    assert api.model_info(REPO).sha == first


def test_a_download_that_breaks_off_is_resumed(api, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # whole chunks are kept; they have 10 MB otherwise
    api.create_repo(REPO)
    commit(api, "first")
    hub.cut_download_after = 1000
    assert open(hf_hub_download(REPO, "model.safetensors"), "rb").read() == LARGE
    address = f"GET /store/{hashlib.sha256(LARGE).hexdigest()}"
    assert [line for line in hub.requests if line.startswith("GET /store/")] == [address, f"{address} bytes=1000-"]


def test_a_model_card_is_checked_before_anything_is_uploaded(api, hub):
    api.create_repo(REPO)
    card = b"---\nlanguage: en\npipeline_tag: visual-question-answering\ntags: [trips]\n---\n# Model\n"
    api.create_commit(REPO, [CommitOperationAdd("README.md", card)], commit_message="card")
    info = api.model_info(REPO)
    assert (info.pipeline_tag, info.tags, info.card_data["language"]) == ("visual-question-answering", ["trips"], "en")
    assert ModelCard.load(REPO).text == "# Model\n"
    ModelCard.load(REPO).validate()
    for metadata, error in (("a: [", "a: \\["), ("model-index: [1]", "model_index")):
        bad = CommitOperationAdd("README.md", f"---\n{metadata}\n---\n".encode())
        with pytest.raises(ValueError, match=error):
            api.create_commit(REPO, [bad], commit_message="bad")
    assert api.model_info(REPO).sha == info.sha
    with pytest.raises(BadRequestError):
        api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="to a tag", revision=info.sha)
