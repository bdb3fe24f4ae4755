"""The Hub's own addresses: who am I, repos, refs, listings, commits, and `/resolve` where downloads begin."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

import yaml
from aiohttp import web

from .storage import ranged
from .store import Entry, HubError, Repo, git_sha1

if TYPE_CHECKING:
    from .server import LocalHub

# Those of a new model repo on huggingface.co, as far as they matter here.
LFS_SUFFIXES = (
    ".7z",
    ".arrow",
    ".bin",
    ".bz2",
    ".ckpt",
    ".gz",
    ".h5",
    ".model",
    ".msgpack",
    ".npy",
    ".npz",
    ".onnx",
    ".parquet",
    ".pickle",
    ".pkl",
    ".pt",
    ".pth",
    ".safetensors",
    ".tar",
    ".tgz",
    ".xz",
    ".zip",
    ".zst",
    "tfevents*",
)
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
STALE = "The branch was updated since you opened this page. Please refresh and try again."


def read_card(text: str) -> dict:
    """The YAML at the top of a README.md; {} if there is none."""
    found = re.match(r"---\r?\n(.*?)\r?\n?---\s*(\r?\n|$)", text, re.DOTALL)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid metadata in README.md: {' '.join(str(error).split())}") from None
    if card is not None and not isinstance(card, dict):
        raise HubError(400, "Invalid metadata in README.md: not a mapping")
    return card or {}


class Api:
    def __init__(self, hub: LocalHub):
        self.hub, self.store = hub, hub.store

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/whoami-v2", self.whoami)
        router.add_post("/api/validate-yaml", self.validate_yaml)
        router.add_post("/api/repos/create", self.create_repo)
        router.add_delete("/api/repos/delete", self.delete_repo)
        for prefix, kind in (("", "model"), ("/datasets", "dataset")):
            page, api = f"{prefix}/{{namespace}}/{{name}}", f"/api/{kind}s/{{namespace}}/{{name}}"
            for method, path, handler, act in (
                ("GET", f"{api}", self.info, "read"),
                ("GET", f"{api}/revision/{{revision}}", self.info, "read"),
                ("GET", f"{api}/tree/{{revision}}", self.list_tree, "read"),
                ("GET", f"{api}/tree/{{revision}}/{{path:.+}}", self.list_tree, "read"),
                ("POST", f"{api}/paths-info/{{revision}}", self.paths_info, "read"),
                ("GET", f"{api}/refs", self.refs, "read"),
                ("GET", f"{api}/commits/{{revision}}", self.commits, "read"),
                ("POST", f"{api}/branch/{{revision}}", self.create_branch, "write"),
                ("DELETE", f"{api}/branch/{{revision}}", self.delete_branch, "write"),
                ("POST", f"{api}/tag/{{revision}}", self.create_tag, "write"),
                ("DELETE", f"{api}/tag/{{revision}}", self.delete_tag, "write"),
                ("POST", f"{api}/preupload/{{revision}}", self.preupload, "write"),
                ("POST", f"{api}/commit/{{revision}}", self.commit, "write"),
                ("GET", f"{api}/xet-read-token/{{revision}}", self.hub.storage.xet_token, "read"),
                ("GET", f"{api}/xet-write-token/{{revision}}", self.hub.storage.xet_token, "write"),
                ("POST", f"{page}/info/lfs/objects/batch", self.lfs_batch, "write"),
                ("POST", f"{page}/info/lfs/verify", self.lfs_verify, "write"),
                ("GET", f"{page}/resolve/{{revision}}/{{path:.+}}", self.resolve, "read"),
                ("HEAD", f"{page}/resolve/{{revision}}/{{path:.+}}", self.resolve, "read"),
            ):
                router.add_route(method, path, self._for_repo(handler, kind, act))

    def _for_repo(self, handler, kind: str, act: str):
        """A handler of (request, repo), called if the repo exists and the one who asks may do `act`."""

        async def handle(request: web.Request) -> web.Response:
            return await handler(request, self.hub.repo(request, kind, act))

        return handle

    async def whoami(self, request: web.Request) -> web.Response:
        user = self.hub.known_user(request)
        organizations = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.organizations.items()]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        return web.json_response({"type": "user", "name": user.name, "orgs": organizations, "auth": token})

    async def validate_yaml(self, request: web.Request) -> web.Response:
        read_card((await request.json())["content"])
        return web.json_response({"errors": [], "warnings": []})

    async def create_repo(self, request: web.Request) -> web.Response:
        user, asked = self.hub.known_user(request), await request.json()
        repo = Repo(
            asked.get("type") or "model",
            asked.get("organization") or user.name,
            asked["name"],
            private=asked.get("visibility") == "private",
        )
        if not self.hub.may(user, "write", repo.namespace):
            raise HubError(403, f"You don't have the rights to create a {repo.type} under {repo.namespace}")
        if repo.type not in ("model", "dataset") or not re.fullmatch(r"[\w.-]{1,96}", repo.name):
            raise HubError(400, f"Invalid repo: {repo.type} {repo.id}")
        url = f"{self.hub.endpoint}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}"
        if (repo.type, repo.id) in self.store.repos:
            return web.json_response({"error": f"You already created this {repo.type} repo", "url": url}, status=409)
        tree = {".gitattributes": self.store.regular_entry(GITATTRIBUTES.encode())}
        self.store.add_commit(repo, "main", tree, "initial commit", "", user.name)
        return web.json_response({"url": url, "name": repo.id, "private": repo.private})

    async def delete_repo(self, request: web.Request) -> web.Response:
        user, asked = self.hub.known_user(request), await request.json()
        request.match_info.update(namespace=asked.get("organization") or user.name, name=asked["name"])
        self.store.delete(self.hub.repo(request, asked.get("type") or "model", "write"))
        return web.json_response({})

    async def info(self, request: web.Request, repo: Repo) -> web.Response:
        commit = repo.commit(request.match_info.get("revision", "main"))
        readme = commit.tree.get("README.md")
        card = read_card(self.store.blob(readme.sha256).read_text(errors="replace")) if readme else {}
        about = {
            "id": repo.id,
            "author": repo.namespace,
            "sha": commit.id,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "cardData": card,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "siblings": [
                {"rfilename": path, "size": entry.size, "blobId": entry.oid, "lfs": entry.lfs_info()}
                for path, entry in sorted(commit.tree.items())
            ],
        }
        return web.json_response(about)

    def _described(self, path: str, entry: Entry | None) -> dict:
        if entry is None:
            return {"type": "directory", "path": path, "oid": git_sha1("tree", path.encode()), "size": 0}
        about = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
        xet_hash = self.hub.storage.xet_hashes.get(entry.sha256)
        return about | ({"lfs": entry.lfs_info()} if entry.lfs else {}) | ({"xetHash": xet_hash} if xet_hash else {})

    @staticmethod
    def _with_folders(tree: dict[str, Entry]) -> dict[str, Entry | None]:
        folders = {path[:at] for path in tree for at, letter in enumerate(path) if letter == "/"}
        return dict(sorted((dict.fromkeys(folders) | tree).items()))

    async def list_tree(self, request: web.Request, repo: Repo) -> web.Response:
        tree = self._with_folders(repo.commit(request.match_info["revision"]).tree)
        start = f"{request.match_info['path'].strip('/')}/" if "path" in request.match_info else ""
        if start and tree.get(start[:-1], True) is not None:
            raise HubError(404, f"{start} does not exist", "EntryNotFound")
        deep = request.query.get("recursive", "").lower() in ("1", "true")
        inside = [path for path in tree if path.startswith(start) and (deep or "/" not in path.removeprefix(start))]
        return web.json_response([self._described(path, tree[path]) for path in inside])

    async def paths_info(self, request: web.Request, repo: Repo) -> web.Response:
        tree = self._with_folders(repo.commit(request.match_info["revision"]).tree)
        as_json = request.content_type == "application/json"
        paths = (await request.json())["paths"] if as_json else (await request.post()).getall("paths", [])
        return web.json_response([self._described(path, tree[path]) for path in paths if path in tree])

    async def refs(self, request: web.Request, repo: Repo) -> web.Response:
        def listed(refs: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

        branches, tags = listed(repo.branches, "refs/heads/"), listed(repo.tags, "refs/tags/")
        return web.json_response({"branches": branches, "tags": tags, "converts": []})

    async def commits(self, request: web.Request, repo: Repo) -> web.Response:
        history = [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repo.history(request.match_info["revision"])
        ]
        return web.json_response(history)

    async def create_branch(self, request: web.Request, repo: Repo) -> web.Response:
        name, asked = request.match_info["revision"], await request.json() if request.can_read_body else {}
        self._create(repo, repo.branches, f"refs/heads/{name}", repo.commit(asked.get("startingPoint") or "main").id)
        return web.json_response({}, status=201)

    async def create_tag(self, request: web.Request, repo: Repo) -> web.Response:
        asked = await request.json()
        self._create(repo, repo.tags, f"refs/tags/{asked['tag']}", repo.commit(request.match_info["revision"]).id)
        return web.json_response({}, status=201)

    def _create(self, repo: Repo, refs: dict[str, str], ref: str, oid: str) -> None:
        name = ref.split("/", 2)[2]
        if name in refs:
            raise HubError(409, f"Reference already exists: {ref}")
        refs[name] = oid
        self.store.save(repo)

    async def delete_branch(self, request: web.Request, repo: Repo) -> web.Response:
        if request.match_info["revision"] == "main":
            raise HubError(403, "Cannot delete the main branch")
        return self._delete(repo, repo.branches, request.match_info["revision"])

    async def delete_tag(self, request: web.Request, repo: Repo) -> web.Response:
        return self._delete(repo, repo.tags, request.match_info["revision"])

    def _delete(self, repo: Repo, refs: dict[str, str], name: str) -> web.Response:
        if refs.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self.store.save(repo)
        return web.json_response({})

    def _is_large(self, path: str, size: int, sample: bytes) -> bool:
        return size > 0 and (path.endswith(LFS_SUFFIXES) or size > self.hub.lfs_above or b"\0" in sample)

    async def preupload(self, request: web.Request, repo: Repo) -> web.Response:
        """Says which files go to storage, and what is there under their paths, so that equal ones are not sent."""
        commit, files = repo.commit(request.match_info["revision"]), []
        for file in (await request.json())["files"]:
            large = self._is_large(file["path"], file["size"], base64.b64decode(file.get("sample", "")))
            about = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if entry := commit.tree.get(file["path"]):
                about["oid"] = entry.sha256 if entry.lfs else entry.oid
            files.append(about)
        return web.json_response({"files": files, "commitOid": commit.id})

    async def lfs_batch(self, request: web.Request, repo: Repo) -> web.Response:
        verify = {"href": f"{self.hub.endpoint}{request.path.removesuffix('/objects/batch')}/verify"}
        objects = []
        for asked in (await request.json())["objects"]:
            about = {"oid": asked["oid"], "size": asked["size"]}
            if not self.store.blob(asked["oid"]).exists():
                upload = self.hub.storage.upload_action(asked["oid"], asked["size"])
                about["actions"] = {"upload": upload, "verify": verify}
            objects.append(about)
        return web.json_response({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    async def lfs_verify(self, request: web.Request, repo: Repo) -> web.Response:
        asked = await request.json()
        if self.store.lfs_entry(asked["oid"]).size != asked["size"]:
            raise HubError(404, "LFS object of the wrong size")
        return web.json_response({})

    async def commit(self, request: web.Request, repo: Repo) -> web.Response:
        """One transaction: the tree is made aside, and replaces the branch's only after every operation was possible."""
        branch = request.match_info["revision"]
        header, *operations = [json.loads(line) for line in (await request.read()).splitlines() if line.strip()]
        for operation in operations:
            if operation["key"] == "lfsFile":
                await self.hub.storage.unpack(operation["value"]["oid"])
        # From here on nothing waits, so no other request comes between.
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent, header = repo.branches[branch], header["value"]
        if not parent.startswith(header.get("parentCommit", parent)):
            raise HubError(412, STALE)
        tree = dict(repo.commits[parent].tree)
        for operation in operations:
            self._apply(tree, operation["key"], operation["value"])
        title, message = header.get("summary", ""), header.get("description", "")
        oid = self.store.add_commit(repo, branch, tree, title, message, self.hub.known_user(request).name)
        url = f"{self.hub.endpoint}/{repo.id}/commit/{oid}"
        return web.json_response({"success": True, "commitOid": oid, "commitUrl": url})

    def _apply(self, tree: dict[str, Entry], operation: str, value: dict) -> None:
        path = value["path"].rstrip("/")
        if not path or "\\" in path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(422, f"Invalid path: {path}")
        if operation == "file":
            content = base64.b64decode(value["content"])
            if len(content) > self.hub.lfs_above:
                raise HubError(413, f"{path}: too large for a regular file")
            if path == "README.md":
                read_card(content.decode(errors="replace"))
            tree[path] = self.store.regular_entry(content)
        elif operation == "lfsFile":
            tree[path] = self.store.lfs_entry(value["oid"])
        elif operation in ("deletedFile", "deletedFolder"):
            gone = [name for name in tree if name == path or name.startswith(f"{path}/")]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise HubError(400, f"Unknown operation {operation}")

    async def resolve(self, request: web.Request, repo: Repo) -> web.Response:
        """A regular file itself; for a large one, the signed address of its content at the other origin."""
        commit = repo.commit(request.match_info["revision"])
        headers, entry = {"X-Repo-Commit": commit.id}, commit.tree.get(request.match_info["path"])
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if not entry.lfs:
            return ranged(request, self.store.blob(entry.sha256), headers | {"ETag": f'"{entry.oid}"'})
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
        headers["Location"] = self.hub.storage.sign("get", entry.sha256)
        if xet_hash := self.hub.storage.xet_hashes.get(entry.sha256):
            route = f"{self.hub.endpoint}/api/{repo.type}s/{repo.id}/xet-read-token/{quote(commit.id)}"
            headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
        return web.Response(status=302, headers=headers)
