"""A Hub in memory that speaks what `huggingface_hub` speaks: repositories, commits, LFS and downloads over HTTP."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse


PIPELINE_TAGS = {"text-to-image", "text-to-video", "image-to-image", "image-to-video"}
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Blob:
    """A file of a repository, in git or in LFS."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    """A state of a branch."""

    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """A model repository: its branches, each with its commits from the first to the last."""

    private: bool
    branches: dict[str, list[Commit]]

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.branches[branch][-1].files.items()}

    def messages(self, branch: str = "main") -> list[str]:
        return [commit.message for commit in self.branches[branch][1:]]

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for commits in self.branches.values() for one in commits if one.oid == revision), None)


@dataclass
class Hub:
    """
    What the Hub holds.

    Args:
        tokens (`dict[str, str]`):
            The role of each token of the user "me", `"write"` or `"read"`.
        repositories (`dict[str, Repository]`):
            By id.
        objects (`dict[str, bytes]`):
            LFS content by SHA-256.
        lfs_suffixes (`tuple[str, ...]`):
            Of the files that are not kept in git.
        broken (`str`, *optional*):
            A pattern: requests whose path it matches are answered with status 500.
        requests (`list[str]`):
            Method and path of what was asked.
    """

    tokens: dict[str, str] = field(default_factory=lambda: {"hf_write": "write", "hf_read": "read"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    lfs_suffixes: tuple[str, ...] = (".safetensors", ".bin", ".pt", ".pth", ".png")
    broken: str | None = None
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        blobs = {path: Blob(content, path.endswith(self.lfs_suffixes)) for path, content in (files or {}).items()}
        self.objects.update({blob.oid: blob.content for blob in blobs.values() if blob.lfs})
        first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", blobs)
        self.repositories[repo_id] = Repository(private, {"main": [first]})
        return self.repositories[repo_id]


class Refusal(Exception):
    """An answer that is an error, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a card, by the rules of the Hub's documentation."""
    block = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    data = yaml.safe_load(block[1]) if block else None
    if not isinstance(data, dict):
        return ["there is no metadata"]
    errors = []
    if data.get("pipeline_tag") not in PIPELINE_TAGS:
        errors.append(f"pipeline_tag is {data.get('pipeline_tag')!r}")
    if not isinstance(data.get("library_name"), str):
        errors.append("library_name is no string")
    for name in ("tags", "base_model", "datasets"):
        values = data.get(name, [])
        if not all(isinstance(value, str) for value in ([values] if isinstance(values, str) else values)):
            errors.append(f"{name} is no list of strings")
    if isinstance(data.get("base_model"), str) and not REPO_ID.fullmatch(data["base_model"]):
        errors.append(f"base_model is {data['base_model']!r}, no model id")
    for entry in data.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry.get("output", {}).get("url"), str):
            errors.append(f"widget has {entry!r}")
    return errors


def role(hub: Hub, request: Request) -> str | None:
    """What the request may do; `None` without a token."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    if (token := header.removeprefix("Bearer ")) not in hub.tokens:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return hub.tokens[token]


def repository(hub: Hub, request: Request, repo_id: str, write: bool = False) -> Repository:
    """The repository, if the request may see it or write to it."""
    allowed = role(hub, request)
    found = hub.repositories.get(repo_id)
    if found is None or (found.private and allowed is None):
        raise Refusal(404 if allowed else 401, "Repository not found", "RepoNotFound")
    if write and (allowed != "write" or not repo_id.startswith("me/")):
        raise Refusal(403, f"Forbidden: you don't have write access to {repo_id}")
    return found


def head(repo: Repository, revision: str) -> Commit:
    commit = repo.commit(unquote(revision))
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def application(hub: Hub) -> FastAPI:
    """The HTTP side of the Hub."""
    app = FastAPI()

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
        return JSONResponse({"error": refusal.message}, refusal.status, headers)

    @app.middleware("http")
    async def watch(request: Request, call_next: Any) -> Response:
        hub.requests.append(f"{request.method} {request.url.path}")
        if hub.broken and re.search(hub.broken, request.url.path):
            return JSONResponse({"error": "Internal Error"}, 500)
        return await call_next(request)

    add_account(app, hub)
    add_repositories(app, hub)
    add_lfs(app, hub)
    add_commits(app, hub)
    add_downloads(app, hub)
    return app


def add_account(app: FastAPI, hub: Hub) -> None:
    """Who asks and what may be written to, and whether a card is valid."""

    @app.get("/api/whoami-v2")
    async def whoami(request: Request) -> Response:
        if role(hub, request) is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return JSONResponse({"type": "user", "name": "me", "orgs": []})

    @app.get("/api/models/{user}/{name}/auth-check/write")
    async def may_write(request: Request, user: str, name: str) -> Response:
        repository(hub, request, f"{user}/{name}", write=True)
        return JSONResponse({})

    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> Response:
        errors = [{"message": error} for error in metadata_errors((await request.json())["content"])]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)


def add_repositories(app: FastAPI, hub: Hub) -> None:
    """Repositories and branches are made."""

    @app.post("/api/repos/create")
    async def create(request: Request) -> Response:
        allowed, body = role(hub, request), await request.json()
        repo_id = f"{body['organization'] or 'me'}/{body['name']}"
        if allowed is None:
            raise Refusal(401, "Invalid username or password.")
        if repo_id in hub.repositories:
            return JSONResponse({"url": f"{hub.endpoint}/{repo_id}", "error": "You already created this repo"}, 409)
        if allowed != "write" or not repo_id.startswith("me/"):
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        hub.add(repo_id, private=body.get("visibility") == "private")
        return JSONResponse({"url": f"{hub.endpoint}/{repo_id}", "name": repo_id})

    @app.post("/api/models/{user}/{name}/branch/{branch}")
    async def branch(request: Request, user: str, name: str, branch: str) -> Response:
        branches = repository(hub, request, f"{user}/{name}", write=True).branches
        if branch in branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        branches[branch] = branches["main"][:]
        return JSONResponse({})


def add_lfs(app: FastAPI, hub: Hub) -> None:
    """Large files."""

    @app.post("/{user}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request, user: str, name: str) -> Response:
        repository(hub, request, f"{user}/{name}", write=True)
        objects = []
        for one in (await request.json())["objects"]:
            upload = {
                "upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"},
                "verify": {"href": f"{hub.endpoint}/lfs"},
            }
            objects.append({**one, **({} if one["oid"] in hub.objects else {"actions": upload})})
        return JSONResponse({"transfer": "basic", "objects": objects})

    @app.put("/lfs/{oid}")
    async def put(request: Request, oid: str) -> Response:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content is not what its SHA-256 says")
        hub.objects[oid] = content
        return Response()

    @app.post("/lfs")
    async def verify(request: Request) -> Response:
        body = await request.json()
        if len(hub.objects.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, "the object is not there")
        return JSONResponse({})


def add_commits(app: FastAPI, hub: Hub) -> None:
    """What is asked before a commit, and the commit."""

    @app.post("/api/models/{user}/{name}/preupload/{revision}")
    async def preupload(request: Request, user: str, name: str, revision: str) -> Response:
        files = head(repository(hub, request, f"{user}/{name}", write=True), revision).files
        return JSONResponse(
            {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(hub.lfs_suffixes) else "regular",
                        "shouldIgnore": False,
                        "oid": files[one["path"]].oid if one["path"] in files else None,
                    }
                    for one in (await request.json())["files"]
                ]
            }
        )

    @app.post("/api/models/{user}/{name}/commit/{revision}")
    async def commit(request: Request, user: str, name: str, revision: str) -> Response:
        repo = repository(hub, request, f"{user}/{name}", write=True)
        files, message = dict(head(repo, revision).files), ""
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    files[value["path"]] = Blob(hub.objects[value["oid"]], lfs=True)
                case _:
                    raise Refusal(400, f"unknown operation {item['key']}")
        commits = repo.branches[revision]
        new = Commit(hashlib.sha1(f"{commits[-1].oid}{message}".encode()).hexdigest(), message, files)
        commits.append(new)
        return JSONResponse({"commitUrl": f"{hub.endpoint}/{user}/{name}/commit/{new.oid}", "commitOid": new.oid})


def add_downloads(app: FastAPI, hub: Hub) -> None:
    """What is in a repository, and its files: LFS ones from another host, as from the CDN."""

    @app.get("/api/models/{user}/{name}")
    @app.get("/api/models/{user}/{name}/revision/{revision}")
    async def info(request: Request, user: str, name: str, revision: str = "main") -> Response:
        repo = repository(hub, request, f"{user}/{name}")
        commit = head(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return JSONResponse(
            {"id": f"{user}/{name}", "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}
        )

    @app.get("/api/models/{user}/{name}/tree/{revision}")
    async def tree(request: Request, user: str, name: str, revision: str) -> Response:
        files = head(repository(hub, request, f"{user}/{name}"), revision).files
        entries = []
        for path, blob in files.items():
            size = len(blob.content)
            lfs = {"lfs": {"oid": blob.oid, "size": size, "pointerSize": 130}} if blob.lfs else {}
            entries.append({"type": "file", "oid": blob.oid, "size": size, "path": path, **lfs})
        return JSONResponse(entries)

    @app.api_route("/{user}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(request: Request, user: str, name: str, revision: str, path: str) -> Response:
        commit = head(repository(hub, request, f"{user}/{name}"), revision)
        if (blob := commit.files.get(path)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return Response(blob.content, headers=headers)
        headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        cdn = hub.endpoint.replace("127.0.0.1", "localhost")
        return RedirectResponse(f"{cdn}/cdn/{blob.oid}", 302, headers)

    @app.get("/cdn/{oid}")
    async def cdn(oid: str) -> Response:
        return Response(hub.objects[oid])


@contextmanager
def running(hub: Hub, port: int = 0) -> Iterator[Hub]:
    """Serves a Hub from a thread while the context is open."""
    config = uvicorn.Config(application(hub), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    hub.endpoint = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
