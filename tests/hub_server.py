"""A Hub on loopback: as much of the Hub's HTTP API as the real `huggingface_hub` client needs to push and to load.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=WRITE_TOKEN).create_repo("anna/student")

Creating, branches, preupload, LFS batch and upload, commit, repository info, tree, resolve, whoami. A token it doesn't know is
refused with 401, one that may only read with 403. ``hub.cut`` breaks the next uploads off in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN, USER = "hf_write", "hf_read", "anna"


@dataclass
class Repository:
    """Every commit is a whole list of files."""

    kind: str
    sdk: str | None = None
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    large: set[str] = field(default_factory=set)
    """Paths that were uploaded by LFS."""
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    """Commits of the branches besides main."""

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        commits = self.branches.get(revision, self.commits)
        oid = hashlib.sha1(f"{revision}{len(commits)}{sorted(files)}".encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", "HEAD", *self.branches):
            return self.branches.get(revision, self.commits)[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def metadata(self) -> dict:
        text = self.files.get("README.md", b"").decode()
        return (yaml.safe_load(text.split("---")[1]) or {}) if text.startswith("---") else {}


class HubServer:
    """The server; ``url`` is what HF_ENDPOINT must be."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        """Object ids in the order in which they arrived whole."""
        self.requests: list[str] = []
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        """By token, its role; a token that is taken out is revoked."""
        self.cut = 0
        """So many more uploads are broken off in the middle; -1: all."""
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, kind: str = "models", files: dict[str, bytes] | None = None, sdk: str | None = None):
        """A repository that is there already."""
        repository = self.repositories[kind, name] = Repository(kind, sdk)
        repository.commit({".gitattributes": b"", **(files or {})})
        return repository


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **more: str):
        self.status, self.message, self.code, self.more = status, message, code, more


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _handle(self):
        hub = self.server_of
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        hub.requests.append(f"{self.command} {url.path}")
        try:
            if parts[0] == "lfs":
                return self._upload(parts[1])
            body = self._body()
            if parts[0] == "api":
                answer = self._api(parts[1:], body, parse_qs(url.query))
            elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
                answer = self._batch(json.loads(body))
            elif "resolve" in parts:
                return self._resolve(parts)
            else:
                raise _Refused(404, "no such page")
            self._send(200, json.dumps(answer).encode())
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(refused.status, json.dumps({"error": refused.message, **refused.more}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _user(self, write: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        role = self.server_of.tokens.get(token)
        if (token and role is None) or (write and not token):
            raise _Refused(401, "Invalid username or password.")
        if write and role != "write":
            raise _Refused(403, f"you don't have write access: this token has role {role}")
        return USER if token else None

    def _repository(self, kind: str, name: str) -> Repository:
        if (kind, name) not in self.server_of.repositories:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return self.server_of.repositories[kind, name]

    # -- api ---------------------------------------------------------------------------------------------------------

    def _api(self, parts: list[str], body: bytes, query: dict):
        if parts == ["whoami-v2"]:
            return {"type": "user", "name": self._user(write=False), "orgs": []}
        if parts == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        if parts == ["repos", "create"]:
            return self._create(json.loads(body))
        kind, name, action = parts[0], "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "info"
        repository = self._repository(kind, name)
        revision = parts[4] if len(parts) > 4 else "main"
        self._user(write=action in ("branch", "preupload", "commit"))
        if action == "branch":
            if revision.startswith("refs/"):
                raise _Refused(400, f"Invalid branch name: {revision}")
            if repository.at(revision) is not None:
                raise _Refused(409, f"Reference already exists: {revision}")
            repository.branches[revision] = list(repository.commits)
            return {}
        commit = repository.at(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if action == "preupload":
            return self._preupload(commit[1], json.loads(body))
        if action == "commit":
            return self._commit(repository, name, revision, body)
        if action == "tree":
            return self._tree(repository, commit[1], "/".join(parts[5:]), "recursive" in query)
        return self._info(repository, name, *commit)

    def _create(self, wish: dict):
        user = self._user(write=True)
        owner, kind = wish.get("organization") or user, f"{wish.get('type') or 'model'}s"
        name = f"{owner}/{wish['name']}"
        if owner != user:
            raise _Refused(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {owner!r}")
        url = f"{self.server_of.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.server_of.repositories:
            raise _Refused(409, "You already created this repo", url=url)
        self.server_of.add(name, kind, sdk=wish.get("sdk"))
        return {"url": url, "name": name}

    @staticmethod
    def _preupload(there: dict[str, bytes], wish: dict):
        files = []
        for file in wish["files"]:
            path, old = file["path"], there.get(file["path"])
            large = file["size"] > 2**20 or path.endswith((".safetensors", ".png"))
            algorithm = (
                hashlib.sha256(old or b"") if large else hashlib.sha1(b"blob %d\0" % len(old or b"") + (old or b""))
            )
            oid = None if old is None else algorithm.hexdigest()
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _commit(self, repository: Repository, name: str, revision: str, body: bytes):
        files = dict(repository.at(revision)[1])
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                if value["oid"] not in self.server_of.blobs:
                    raise _Refused(400, f"the object {value['oid']} was never uploaded")
                files[value["path"]] = self.server_of.blobs[value["oid"]]
                repository.large.add(value["path"])
            elif part["key"] == "deletedFile":
                files.pop(value["path"])
        oid = repository.commit(files, revision)
        return {"commitUrl": f"{self.server_of.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}

    @staticmethod
    def _tree(repository: Repository, files: dict[str, bytes], folder: str, recursive: bool):
        entries = []
        for path, data in files.items():
            if path.startswith(folder and folder + "/") and (recursive or "/" not in path[len(folder) :].strip("/")):
                oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
                if path in repository.large:
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entries.append(entry)
        if folder and not entries:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        return entries

    @staticmethod
    def _info(repository: Repository, name: str, oid: str, files: dict[str, bytes]):
        card = repository.metadata()
        return {
            "id": name,
            "sha": oid,
            "private": False,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "sdk": repository.sdk,
            "siblings": [{"rfilename": path} for path in files],
        }

    # -- files -------------------------------------------------------------------------------------------------------

    def _batch(self, wish: dict):
        self._user(write=True)
        answers = []
        for thing in wish["objects"]:
            answer = {"oid": thing["oid"], "size": thing["size"]}
            if thing["oid"] not in self.server_of.blobs:  # otherwise there is nothing to do
                answer["actions"] = {"upload": {"href": f"{self.server_of.url}/lfs/{thing['oid']}"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def _upload(self, oid: str):
        hub = self.server_of
        if hub.cut:
            hub.cut -= 1
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)) // 2))
            self.close_connection = True
            return
        data = self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Refused(400, "other bytes than were announced")
        hub.blobs[oid] = data
        hub.uploads.append(oid)
        self._send(200, b"")

    def _resolve(self, parts: list[str]):
        self._user()
        kind = parts.pop(0) if parts[0] in ("spaces", "datasets") else "models"
        repository = self._repository(kind, "/".join(parts[:2]))
        commit = repository.at(parts[3])
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {parts[3]}", "RevisionNotFound")
        oid, files = commit
        path = "/".join(parts[4:])
        if path not in files:
            raise _Refused(404, f"{path} does not exist", "EntryNotFound")
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if path in repository.large else hashlib.sha1(data).hexdigest()
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{etag}"', "X-Repo-Commit": oid}
        self._send(200, data, headers)
