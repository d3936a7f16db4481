"""
A Hub on 127.0.0.1 for the `huggingface_hub` client: model repositories with one branch, commits and downloads.

    with LoopbackHub() as hub:
        HfApi(endpoint=hub.url, token="hf_ada").create_repo("ada/model")
        subprocess.run(command, env=os.environ | hub.client_environment(home))

It accepts every token, and writing needs one. It stores all files in commits, without LFS and Xet.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils.sha import git_hash


MODEL = "/api/models/([^/]+/[^/]+)"


class Repository:
    """Whether a repository is private, and the files of each commit by their path."""

    def __init__(self, private):
        self.private = private
        self.commits: list[dict[str, bytes]] = [{}]

    @property
    def files(self):
        return self.commits[-1]

    @property
    def sha(self):
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class LoopbackHub(ThreadingHTTPServer):
    """
    Attributes:
        url (`str`): The `HF_ENDPOINT` to give to the client.
        repositories (`dict[str, Repository]`): Published repositories.
        requests (`list[str]`): Every request so far, as in "GET /api/whoami-v2".
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def client_environment(self, home):
        """Return environment variables that point a client to this Hub, with a separate cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_ada",
            "NO_PROXY": "127.0.0.1",
        }

    def connect(self, monkeypatch, home):
        """Apply `client_environment` to the running process, whose client has already read its environment."""
        for name, value in self.client_environment(home).items():
            monkeypatch.setenv(name, value)
        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # created once, with the address at that time


class _Handler(BaseHTTPRequestHandler):
    """A connection. Routes return the content of a response, or content, status and headers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # avoids 40 ms of delay

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        reply = {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
        if self.command == "POST" and not self.headers.get("Authorization", "").removeprefix("Bearer "):
            reply = {"error": "Invalid username or password."}, 401, {}
        else:
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command.replace("HEAD", "GET"):
                    with suppress(KeyError):
                        reply = route(self, *match.groups())
        content, status, headers = reply if isinstance(reply, tuple) else (reply, 200, {})
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *args):
        """Log nothing: `LoopbackHub.requests` has all requests."""

    def create_repository(self):
        options = json.loads(self.body)
        repo_id = f"{options.get('organization') or 'ada'}/{options['name']}"
        status = 409 if repo_id in self.server.repositories else 200
        self.server.repositories.setdefault(repo_id, Repository(private=options.get("visibility") == "private"))
        return {"url": f"{self.server.url}/{repo_id}"}, status, {}

    def model_info(self, repo_id):
        repository = self.server.repositories[repo_id]
        facts = {"id": repo_id, "sha": repository.sha, "private": repository.private, "gated": False}
        return {**facts, "siblings": [{"rfilename": path} for path in repository.files]}

    def list_tree(self, repo_id, folder):
        tree = []
        for path, content in self.server.repositories[repo_id].files.items():
            if path.startswith(folder or ""):
                tree.append({"type": "file", "path": path, "size": len(content), "oid": git_hash(content)})
        if not tree:
            return {"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"}
        return tree, 200, {}

    def preupload(self, repo_id):
        files = json.loads(self.body)["files"]
        return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}

    def commit(self, repo_id):
        repository = self.server.repositories[repo_id]
        files = dict(repository.files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        return {"commitOid": repository.sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{repository.sha}"}

    def download(self, repo_id, path):
        repository = self.server.repositories[repo_id]
        if path not in repository.files:
            return {"error": path}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha}
        content = repository.files[path]
        return content, 200, {"X-Repo-Commit": repository.sha, "ETag": f'"{git_hash(content)}"'}


ROUTES = (
    ("GET", "/api/whoami-v2", lambda handler: {"type": "user", "name": "ada", "orgs": []}),
    ("POST", "/api/validate-yaml", lambda handler: {"errors": [], "warnings": []}),
    ("POST", "/api/repos/create", _Handler.create_repository),
    ("GET", f"{MODEL}(?:/revision/[^/]+)?", _Handler.model_info),
    ("GET", f"{MODEL}/tree/[^/]+(?:/(.+))?", _Handler.list_tree),
    ("POST", f"{MODEL}/preupload/[^/]+", _Handler.preupload),
    ("POST", f"{MODEL}/commit/[^/]+", _Handler.commit),
    ("GET", "/([^/]+/[^/]+)/resolve/[^/]+/(.+)", _Handler.download),
)
