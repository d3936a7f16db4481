"""
A Hub on 127.0.0.1 for the real `huggingface_hub` client: model repositories, commits, LFS, downloads.

    with LoopbackHub(users={"hf_ada": "ada"}) as hub:
        HfApi(endpoint=hub.url, token="hf_ada").create_repo("ada/model")
        subprocess.run(command, env=os.environ | hub.client_environment(home, token="hf_ada"))

It behaves like the real Hub for the client: commits are immutable and atomic; large files are first uploaded to
another host without a token; missing repositories, revisions and files have different error codes; private
repositories look like missing ones. It has no Xet storage, so `HF_HUB_DISABLE_XET` must be set.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils.sha import git_hash


def is_large(content: bytes) -> bool:
    """Return whether a file is binary, and therefore stored by LFS."""
    return b"\0" in content[:512]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def etag(content: bytes) -> str:
    return sha256(content) if is_large(content) else git_hash(content)


class HubError(Exception):
    """A response that the client converts to one of its exceptions."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = ""):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.reply = {"error": message}, status, {name: text for name, text in headers.items() if text}


class Repository:
    """Contents of files by commit and path, and the commits of branches and tags."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.titles: dict[str, str] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def add(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        tree = sorted((path, etag(content)) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([self.branches.get(branch), title, tree]).encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, a tag or a hash."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class LoopbackHub(ThreadingHTTPServer):
    """
    Args:
        users (`dict[str, str]`): The user that each token belongs to. Users own the repositories under their name.

    Attributes:
        url (`str`): The `HF_ENDPOINT` to give to the client.
        repositories (`dict[str, Repository]`): Published repositories.
        requests (`list[str]`): Every request so far, as in "GET /api/whoami-v2".
        refused (`str`): Requests with this prefix are answered with 403, to test failures.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.store_url = (f"http://{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256
        self.requests: list[str] = []
        self.refused = "nothing"
        self.lock = threading.Lock()

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def client_environment(self, home: Path, token: str = "") -> dict[str, str]:
        """Return environment variables that point a client to this Hub, with a separate cache and maybe a token."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {**variables, "HF_TOKEN": token, "NO_PROXY": "127.0.0.1,localhost"}

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str = ""):
        """Apply `client_environment` to the running process, whose client has already read its environment."""
        for name, value in self.client_environment(home, token).items():
            monkeypatch.setenv(name, value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(home / "hub")}
        settings |= {"HF_TOKEN_PATH": str(home / "token"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # created once, with the address at that time


class _Handler(BaseHTTPRequestHandler):
    """A connection. Routes return the content of a response, or content, status and headers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # avoids 40 ms of delay

    def answer(self):
        self.hub = self.server
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            try:
                reply = self._route(urlsplit(self.path).path)
            except HubError as error:
                reply = error.reply
        content, status, headers = reply if isinstance(reply, tuple) else (reply, 200, {})
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args):
        """Log nothing: `LoopbackHub.requests` has all requests."""

    def _route(self, path: str):
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.requests[-1].startswith(self.hub.refused):
            raise HubError(403, f"refused: {self.hub.refused}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user = self.hub.users.get(token)
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                return function(self, **{name: unquote(text) for name, text in match.groupdict("").items()})
        raise HubError(404, f"This Hub does not know {self.hub.requests[-1]}")

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        repository, owner = self.hub.repositories.get(repo_id), repo_id.split("/")[0]
        if repository is None or (repository.private and self.user != owner):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != owner:
            raise HubError(403 if self.user else 401, f"You don't have the right to write to {repo_id}")
        return repository

    # Repositories and their state

    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": []}

    def create_repository(self):
        owner = self.json["organization"] or self.user
        if self.user is None or owner != self.user:
            raise HubError(403 if self.user else 401, f"You can't create a model under the namespace {owner}")
        repo_id = f"{owner}/{self.json['name']}"
        status = 409 if repo_id in self.hub.repositories else 200
        self.hub.repositories.setdefault(repo_id, Repository(private=self.json.get("visibility") == "private"))
        return {"url": f"{self.hub.url}/{repo_id}"}, status, {}

    def model_info(self, repo_id, revision):
        repository = self._repository(repo_id)
        sha = repository.resolve(revision or "main")
        files = repository.commits[sha]
        card = ModelCard(files["README.md"].decode()).data.to_dict() if "README.md" in files else {}
        facts = {name: card[name] for name in ("pipeline_tag", "library_name", "tags") if name in card}
        facts |= {"id": repo_id, "sha": sha, "private": repository.private, "gated": False, "cardData": card}
        return {**facts, "siblings": [{"rfilename": path} for path in files]}

    def list_tree(self, repo_id, revision, folder):
        """Return all files below a folder, without folders."""
        repository = self._repository(repo_id)
        sha = repository.resolve(revision)
        files = {path: content for path, content in repository.commits[sha].items() if path.startswith(folder)}
        if not files:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound", sha)
        return [
            {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
            for path, content in files.items()
        ]

    def list_references(self, repo_id):
        repository = self._repository(repo_id)
        found = {"branches": repository.branches, "tags": repository.tags, "converts": {}}
        return {
            kind: [{"name": name, "ref": name, "targetCommit": sha} for name, sha in references.items()]
            for kind, references in found.items()
        }

    def create_reference(self, repo_id, kind, revision):
        repository = self._repository(repo_id, write=True)
        if kind == "branch":  # the path of a branch has its name, that of a tag has the tagged revision
            references, name, target = repository.branches, revision, self.json.get("startingPoint", "main")
        else:
            references, name, target = repository.tags, self.json["tag"], revision
        if name in references:
            raise HubError(409, f"Reference {name} already exists")
        references[name] = repository.resolve(target)
        return {}

    # Uploads: which files are large, the large ones, then a commit that refers to them

    def validate_card(self):
        try:
            ModelCard(self.json["content"])
        except (ValueError, yaml.YAMLError) as error:
            return {"errors": [{"message": str(error)}]}, 400, {}
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id, revision):
        repository = self._repository(repo_id, write=True)
        present = repository.commits[repository.resolve(revision)]
        answers = []
        for file in self.json["files"]:
            path, mode = file["path"], "lfs" if is_large(base64.b64decode(file["sample"])) else "regular"
            oid = etag(present[path]) if path in present else None
            answers.append({"path": path, "uploadMode": mode, "oid": oid, "shouldIgnore": False})
        return {"files": answers}

    def start_uploads(self, repo_id):
        self._repository(repo_id, write=True)
        objects = self.json["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large_files:
                item["actions"] = {"upload": {"href": f"{self.hub.store_url}/store/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid):
        if sha256(self.body) != oid:
            raise HubError(400, f"The content does not have the sha256 {oid}")
        self.hub.large_files[oid] = self.body
        return {}

    def commit(self, repo_id, revision):
        repository = self._repository(repo_id, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent = repository.resolve(revision)
        if revision not in repository.branches:
            raise HubError(400, f"{revision} is not a branch")
        if header["value"].get("parentCommit", parent) != parent:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for operation in operations:
            self._apply(files, operation["key"], **operation["value"])
        sha = repository.add(revision, header["value"]["summary"], files)
        return {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}

    def _apply(self, files: dict[str, bytes], key: str, path: str, content: str = "", oid: str = "", **_):
        if key == "file":
            files[path] = base64.b64decode(content)
        elif key == "lfsFile" and oid in self.hub.large_files:
            files[path] = self.hub.large_files[oid]
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise HubError(404, f"{key} {path}: A file with this name doesn't exist", "EntryNotFound")

    # Downloads

    def download(self, repo_id, revision, path):
        repository = self._repository(repo_id)
        sha = repository.resolve(revision)
        content = repository.commits[sha].get(path)
        if content is None:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", sha)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag(content)}"'}
        if not is_large(content):
            return content, 200, headers
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(content)}
        return b"", 302, {**headers, "Location": f"{self.hub.store_url}/store/{sha256(content)}"}

    def download_large_file(self, oid):
        if self.user is not None:
            raise HubError(400, "Only one auth mechanism allowed: do not send a token to a signed URL")
        return self.hub.large_files[oid]


_MODEL, _REVISION, _OID = "/(?P<repo_id>[^/]+/[^/]+)", "(?P<revision>[^/]+)", "(?P<oid>[0-9a-f]{64})"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repository),
    ("GET", f"/api/models{_MODEL}(/revision/{_REVISION})?", _Handler.model_info),
    ("GET", f"/api/models{_MODEL}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.list_tree),
    ("GET", f"/api/models{_MODEL}/refs", _Handler.list_references),
    ("POST", f"/api/models{_MODEL}/(?P<kind>branch|tag)/{_REVISION}", _Handler.create_reference),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", f"/api/models{_MODEL}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"{_MODEL}[.]git/info/lfs/objects/batch", _Handler.start_uploads),
    ("PUT", f"/store/{_OID}", _Handler.upload),
    ("POST", f"/api/models{_MODEL}/commit/{_REVISION}", _Handler.commit),
    ("GET", f"{_MODEL}/resolve/{_REVISION}/(?P<path>.+)", _Handler.download),
    ("GET", f"/store/{_OID}", _Handler.download_large_file),
)
