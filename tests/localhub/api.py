"""The Hub's own addresses: who am I, repos, refs, listings, commits, and `/resolve`, where downloads begin."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING

import yaml
from aiohttp import web

from .storage import send_file
from .store import Entry, HubError, Repo, git_id

if TYPE_CHECKING:
    from .server import LocalHub

# Large by name on huggingface.co: those of its patterns that are endings of what these libraries write.
LFS_ENDINGS = (".arrow", ".bin", ".ckpt", ".gz", ".h5", ".model", ".msgpack", ".npy", ".npz", ".onnx", ".parquet")
LFS_ENDINGS += (".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".xz", ".zip", ".zst")
LFS_ABOVE = 10 * 2**20  # bytes
GITATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS)


def read_card(text: str) -> dict:
    """The YAML at the top of a README.md; {} if there is none."""
    found = re.match(r"---\r?\n(.*?)\r?\n?---\s*(\r?\n|$)", text, re.DOTALL)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid metadata in README.md: {' '.join(str(error).split())}") from None
    return card or {}


class Api:
    def __init__(self, hub: LocalHub):
        self.hub, self.store, self.storage = hub, hub.store, hub.storage

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/whoami-v2", self.whoami)
        router.add_post("/api/validate-yaml", self.validate_yaml)
        router.add_post("/api/repos/create", self.create_repo)
        for kind, prefix in (("model", ""), ("dataset", "/datasets")):
            page, api = prefix + "/{namespace}/{name}", f"/api/{kind}s" + "/{namespace}/{name}"
            for add, path, handler, act in (
                (router.add_get, api, self.info, "read"),
                (router.add_get, api + "/revision/{revision}", self.info, "read"),
                (router.add_get, api + "/tree/{revision}", self.list_tree, "read"),
                (router.add_get, api + "/tree/{revision}/{path:.+}", self.list_tree, "read"),
                (router.add_post, api + "/paths-info/{revision}", self.paths_info, "read"),
                (router.add_get, api + "/refs", self.refs, "read"),
                (router.add_get, api + "/commits/{revision}", self.commits, "read"),
                (router.add_post, api + "/{kind:branch|tag}/{revision}", self.create_ref, "write"),
                (router.add_delete, api + "/{kind:branch|tag}/{revision}", self.delete_ref, "write"),
                (router.add_post, api + "/preupload/{revision}", self.preupload, "write"),
                (router.add_post, api + "/commit/{revision}", self.commit, "write"),
                (router.add_get, api + "/xet-read-token/{revision}", self.storage.xet_token, "read"),
                (router.add_get, api + "/xet-write-token/{revision}", self.storage.xet_token, "write"),
                (router.add_post, page + "/info/lfs/objects/batch", self.lfs_batch, "write"),
                (router.add_get, page + "/resolve/{revision}/{path:.+}", self.resolve, "read"),
            ):
                add(path, self._for_repo(handler, kind, act))

    def _for_repo(self, handler, kind: str, act: str):
        """A handler of (request, repo), called if the repo exists and the one who asks may do `act`."""

        async def handle(request: web.Request) -> web.Response:
            return await handler(request, self.hub.repo(request, kind, act))

        return handle

    async def whoami(self, request: web.Request) -> web.Response:
        user = self.hub.user(request, known=True)
        organizations = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.organizations.items()]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.token_role}}
        return web.json_response({"type": "user", "name": user.name, "orgs": organizations, "auth": token})

    async def validate_yaml(self, request: web.Request) -> web.Response:
        try:
            read_card((await request.json())["content"])
        except HubError as error:
            return web.json_response({"errors": [{"message": error.message}]}, status=400)
        return web.json_response({"errors": []})

    async def create_repo(self, request: web.Request) -> web.Response:
        user, asked = self.hub.user(request, known=True), await request.json()
        kind, namespace = asked.get("type") or "model", asked.get("organization") or user.name
        repo = Repo(kind, namespace, asked["name"], private=asked.get("visibility") == "private")
        if not user.may("write", namespace):
            raise HubError(403, f"You don't have the rights to create a {kind} under the namespace {namespace}")
        if kind not in ("model", "dataset") or not re.fullmatch(r"[\w.-]{1,96}", repo.name):
            raise HubError(400, f"Invalid repo: {kind} {repo.id}")
        about = {"url": self.hub.endpoint + repo.page, "name": repo.id}
        if (kind, repo.id) in self.store.repos:
            return web.json_response(about | {"error": f"You already created this {kind} repo"}, status=409)
        tree = {".gitattributes": self.store.regular_entry(GITATTRIBUTES.encode())}
        self.store.add_commit(repo, "main", tree, "initial commit", user.name)
        return web.json_response(about)

    async def info(self, request: web.Request, repo: Repo) -> web.Response:
        commit = repo.commit(request.match_info.get("revision", "main"))
        readme = commit.tree.get("README.md")
        card = read_card(self.store.blob(readme.sha256).read_text(errors="replace")) if readme else {}
        files = [
            {"rfilename": path, "size": entry.size, "blobId": entry.oid, "lfs": entry.lfs_info()}
            for path, entry in sorted(commit.tree.items())
        ]
        about = {"id": repo.id, "author": repo.namespace, "private": repo.private, "gated": False, "disabled": False}
        about |= {"sha": commit.id, "lastModified": commit.date, "createdAt": repo.created, "siblings": files}
        about |= {"cardData": card, "tags": card.get("tags") or [], "downloads": 0, "likes": 0}
        return web.json_response(about | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card})

    @staticmethod
    def _with_folders(tree: dict[str, Entry]) -> dict[str, Entry | None]:
        folders = {path[:at] for path in tree for at, letter in enumerate(path) if letter == "/"}
        return dict(sorted((dict.fromkeys(folders) | tree).items()))

    def _described(self, path: str, entry: Entry | None) -> dict:
        if entry is None:
            return {"type": "directory", "path": path, "oid": git_id(path.encode())}
        about = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size, "lfs": entry.lfs_info()}
        return about | {"xetHash": self.storage.xet_hashes.get(entry.sha256)}

    async def list_tree(self, request: web.Request, repo: Repo) -> web.Response:
        tree = self._with_folders(repo.commit(request.match_info["revision"]).tree)
        folder = request.match_info.get("path", "").strip("/")
        if folder and tree.get(folder, "nothing") is not None:
            raise HubError(404, f"There is no folder {folder}", "EntryNotFound")
        start, deep = f"{folder}/".lstrip("/"), request.query.get("recursive", "").lower() in ("1", "true")
        paths = [path for path in tree if path.startswith(start) and (deep or "/" not in path.removeprefix(start))]
        return web.json_response([self._described(path, tree[path]) for path in paths])

    async def paths_info(self, request: web.Request, repo: Repo) -> web.Response:
        tree = self._with_folders(repo.commit(request.match_info["revision"]).tree)
        paths = (await request.post()).getall("paths", [])
        return web.json_response([self._described(path, tree[path]) for path in paths if path in tree])

    async def refs(self, request: web.Request, repo: Repo) -> web.Response:
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for kind, refs in (("heads", repo.branches), ("tags", repo.tags))
        )
        return web.json_response({"branches": branches, "tags": tags, "converts": []})

    async def commits(self, request: web.Request, repo: Repo) -> web.Response:
        history = []
        for commit in repo.history(request.match_info["revision"]):
            title, _, message = commit.message.partition("\n\n")
            about = {"id": commit.id, "title": title, "message": message, "date": commit.date}
            history.append(about | {"authors": [{"user": commit.author}]})
        return web.json_response(history)

    async def create_ref(self, request: web.Request, repo: Repo) -> web.Response:
        asked, name = await request.json() if request.can_read_body else {}, request.match_info["revision"]
        refs, target = repo.branches, asked.get("startingPoint", "main")
        if request.match_info["kind"] == "tag":
            refs, target, name = repo.tags, name, asked["tag"]
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        refs[name] = repo.commit(target).id
        self.store.save(repo)
        return web.json_response({}, status=201)

    async def delete_ref(self, request: web.Request, repo: Repo) -> web.Response:
        name = request.match_info["revision"]
        refs = repo.tags if request.match_info["kind"] == "tag" else repo.branches
        if refs.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self.store.save(repo)
        return web.json_response({})

    async def preupload(self, request: web.Request, repo: Repo) -> web.Response:
        """Says which files go to storage, and what lies under their paths already, so that equal ones are not sent."""
        tree, files = repo.commit(request.match_info["revision"]).tree, []
        for file in (await request.json())["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            large = file["path"].endswith(LFS_ENDINGS) or file["size"] > LFS_ABOVE or binary
            about = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if entry := tree.get(file["path"]):
                about["oid"] = entry.sha256 if entry.lfs else entry.oid
            files.append(about)
        return web.json_response({"files": files})

    async def lfs_batch(self, request: web.Request, repo: Repo) -> web.Response:
        objects = (await request.json())["objects"]
        for item in objects:
            if not self.store.blob(item["oid"]).exists():
                item["actions"] = {"upload": self.storage.upload_action(item["oid"], item["size"])}
        return web.json_response({"transfer": "basic", "objects": objects})

    async def commit(self, request: web.Request, repo: Repo) -> web.Response:
        """One transaction: the tree is changed aside, and becomes the branch's if every operation was possible."""
        header, *operations = [json.loads(line) for line in (await request.read()).splitlines()]
        # From here on nothing waits, so no other request comes between.
        branch, header = request.match_info["revision"], header["value"]
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = repo.branches[branch]
        if not parent.startswith(header.get("parentCommit", parent)):
            raise HubError(412, "The branch was updated since you opened this page. Please refresh and try again.")
        tree = dict(repo.commits[parent].tree)
        for operation in operations:
            self._apply(tree, operation["key"], operation["value"])
        message = f"{header['summary']}\n\n{header['description']}".strip()
        oid = self.store.add_commit(repo, branch, tree, message, self.hub.user(request).name)
        return web.json_response({"commitOid": oid, "commitUrl": f"{self.hub.endpoint}{repo.page}/commit/{oid}"})

    def _apply(self, tree: dict[str, Entry], operation: str, value: dict) -> None:
        path = value["path"].rstrip("/")
        if any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(422, f"Invalid path: {path}")
        if operation == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md":
                read_card(content.decode(errors="replace"))
            tree[path] = self.store.regular_entry(content)
        elif operation == "lfsFile":
            tree[path] = self.store.lfs_entry(value["oid"])
        elif operation in ("deletedFile", "deletedFolder"):
            gone = [name for name in tree if f"{name}/".startswith(f"{path}/")]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise HubError(400, f"Unknown operation {operation}")

    async def resolve(self, request: web.Request, repo: Repo) -> web.Response:
        """A regular file itself; for a large one, the address of its content at the other origin."""
        commit = repo.commit(request.match_info["revision"])
        headers, entry = {"X-Repo-Commit": commit.id}, commit.tree.get(request.match_info["path"])
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if not entry.lfs:
            return send_file(request, self.store.blob(entry.sha256), headers | {"ETag": f'"{entry.oid}"'})
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
        if xet_hash := self.storage.xet_hashes.get(entry.sha256):
            token = f"{self.hub.endpoint}/api/{repo.type}s/{repo.id}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
        return web.Response(status=302, headers=headers | {"Location": f"{self.storage.url}/get/{entry.sha256}"})
