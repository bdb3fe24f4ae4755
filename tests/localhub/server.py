"""The server itself: two listeners in a thread, who is asking, the log of requests, and faults made on purpose."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from .api import Api
from .storage import Storage
from .store import Commit, HubError, Repo, Store

FAULTS = ("status", "cut_request", "drop_response", "cut_response", "corrupt", "delay", "late")


class User(NamedTuple):
    name: str
    token_role: str
    organizations: dict[str, str]

    def may(self, act: str, namespace: str) -> bool:
        """Whether the user may "read" what is private in `namespace`, or "write" there."""
        role = "write" if self.name == namespace else self.organizations.get(namespace)
        return role in (act, "write") and self.token_role in (act, "write")


ANONYMOUS = User("anonymous", "read", {})
USERS = {
    "hf_alice_write": User("alice", "write", {"acme": "write"}),
    "hf_alice_read": User("alice", "read", {"acme": "write"}),
    "hf_bob_write": User("bob", "write", {"acme": "read"}),
    "hf_maker_write": User("HuggingFaceTB", "write", {}),  # whose models the notebooks name
}


def bearer(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


class LocalHub:
    """A Hub with its files in the folder `root`, on free ports of 127.0.0.1: `start()` and `stop()`, or a `with` block.

    `xet` serves large files by Xet, otherwise by LFS, there in parts of at most `part_bytes` each.
    """

    def __init__(self, root: Path | str, xet: bool = False, *, port: int = 0, part_bytes: int = 5 * 10**6):
        self.root, self.xet, self.port, self.part_bytes = Path(root), xet, port, part_bytes
        self.store = Store(self.root)
        self.storage = Storage(self)
        self.faults: list[dict] = []
        self.log: list[dict] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, token: str = "hf_alice_write") -> dict[str, str]:
        """Environment variables that make the Hugging Face libraries of a process use this Hub; token "": anonymous."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token,
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",  # the client uploads by LFS only if told to
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        if self.xet:
            # With its own settings hf-xet tries for five minutes.
            variables |= {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms"}
            variables["HF_XET_XORB_COMPRESSION_POLICY"] = "none"  # see storage.py
        return variables

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """The commits of a branch, newest first, with `id`, `message` and more."""
        return self.store.repos[repo_type, repo_id].history(revision)

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The files of a revision as the Hub holds them: path -> content."""
        tree = self.store.repos[repo_type, repo_id].commit(revision).tree
        return {path: self.store.blob(entry.sha256).read_bytes() for path, entry in sorted(tree.items())}

    def requests(self, pattern: str = "") -> list[dict]:
        """The requests so far whose "METHOD path" has `pattern` (a regular expression) in it.

        Keys: method, path, port ("hub" or "storage"), status (None until there is one, 499 if the connection was
        closed instead), auth (whose token came: a user's name, "other" such as Xet's own, "-"), range, fault, time
        (seconds of `time.monotonic`).
        """
        return [entry for entry in list(self.log) if re.search(pattern, f"{entry['method']} {entry['path']}")]

    def fault(self, pattern: str, *, skip: int = 0, times: int = 1, headers: dict | None = None, **action) -> dict:
        """Makes requests whose "METHOD path" has `pattern` in it go wrong: the first `skip` pass, the next `times` don't.

        The action is one of
          status=503          answered, with `headers`; the request has no effect
          cut_request=1000    as many bytes of the request's body are read, then the connection is closed; no effect
          drop_response=True  the request is carried out (a commit is applied), then the connection is closed
          cut_response=1000   as many bytes of the response's body are sent, then the connection is closed
          corrupt=True        one bit in the middle of the response's body is changed
                              (both: not of HEAD; large files come from "GET /get/" or, by Xet, "GET /cas/xorb/")
          delay=60.0          seconds pass first; no effect if the client has gone by then
          late=60.0           the request is carried out (a commit is applied), then seconds pass before the answer

        Returns the rule; its "fired" counts the requests that were hit. `faults.clear()` ends all.
        """
        if len(action) != 1 or not action.keys() <= set(FAULTS):
            raise TypeError(f"one of {', '.join(FAULTS)}, not {', '.join(action) or 'nothing'}")
        [(name, value)] = action.items()
        rule = {"pattern": pattern, "skip": skip, "times": times, "action": name, "value": value, "headers": headers}
        self.faults.append(rule | {"seen": 0, "fired": 0})
        return self.faults[-1]

    def reset(self) -> None:
        """Forgets the faults and the log; the repos stay."""
        self.faults.clear()
        self.log.clear()

    def start(self) -> LocalHub:
        ready = threading.Event()

        async def serve():
            self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
            runners = [await self._listen("hub", Api(self), self.port), await self._listen("storage", self.storage, 0)]
            self.port, self.storage.port = (runner.addresses[0][1] for runner in runners)
            ready.set()
            await self._stopping.wait()
            for runner in runners:
                await runner.cleanup()

        self._thread = threading.Thread(target=asyncio.run, args=[serve()], name="localhub", daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise RuntimeError("the test Hub did not start")
        return self

    async def _listen(self, name: str, part: Api | Storage, port: int) -> web.AppRunner:
        application = web.Application(client_max_size=2**31, middlewares=[self._answer])
        application["name"] = name
        part.add_routes(application.router)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    __enter__ = start

    def __exit__(self, *_) -> None:
        self.stop()

    def user(self, request: web.Request, known: bool = False) -> User:
        """Who asks. An unknown token is refused, and no token too if the user has to be `known`."""
        token = bearer(request)
        user = USERS.get(token) if token else ANONYMOUS
        if user is None or (known and user is ANONYMOUS):
            raise HubError(401, "Invalid username or password.")
        return user

    def repo(self, request: web.Request, repo_type: str, act: str = "read") -> Repo:
        """The repo that the request's path names, if the one who asks may see it and do `act`."""
        user, name = self.user(request), request.match_info["name"].removesuffix(".git")
        repo = self.store.repos.get((repo_type, f"{request.match_info['namespace']}/{name}"))
        if repo is None or (repo.private and not user.may("read", repo.namespace)):
            # huggingface.co gives the 401 no error code, and the client takes it for "not found" at https:// only.
            raise HubError(401 if user is ANONYMOUS else 404, "Repository not found", "RepoNotFound")
        if act == "write" and not user.may("write", repo.namespace):
            raise HubError(401 if user is ANONYMOUS else 403, f"Authorization error: no write access to {repo.id}")
        return repo

    def _take_fault(self, request: web.Request) -> dict:
        for rule in list(self.faults):
            bodiless = request.method == "HEAD" and rule["action"] in ("cut_response", "corrupt")
            if re.search(rule["pattern"], f"{request.method} {request.path}") and not bodiless:
                rule["seen"] += 1
                if rule["skip"] < rule["seen"] <= rule["skip"] + rule["times"]:
                    rule["fired"] += 1
                    return rule
        return {"action": None, "value": None}

    @web.middleware
    async def _answer(self, request: web.Request, handler) -> web.StreamResponse:
        """Handles a request with the fault that it is due, and writes the log."""
        fault, token = self._take_fault(request), bearer(request)
        entry = {"method": request.method, "path": request.path, "port": request.app["name"], "status": None}
        entry["auth"] = USERS[token].name if token in USERS else "other" if token else "-"
        entry |= {"range": request.headers.get("Range"), "fault": fault["action"], "time": time.monotonic()}
        self.log.append(entry)
        response = await self._respond(request, handler, fault)
        entry["status"] = response.status
        return response

    async def _respond(self, request: web.Request, handler, fault: dict) -> web.StreamResponse:
        action, value = fault["action"], fault["value"]
        if action == "delay":
            await asyncio.sleep(value)
        if action == "cut_request":
            while value > 0 and (data := await request.content.read(value)):
                value -= len(data)
        if action == "cut_request" or request.transport is None or request.transport.is_closing():
            return self._hang_up(request)
        try:
            if action == "status":
                await request.read()
                raise HubError(value, "a fault made on purpose", headers=fault["headers"])
            response = await handler(request)
            if action in ("cut_response", "corrupt") and not response.body:
                raise HubError(500, f"{action}: this response has no body")
        except HubError as error:
            response = web.json_response({"error": error.message}, status=error.status, headers=error.headers)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason}, status=error.status)
        if action == "late":
            await asyncio.sleep(value)
        if action == "drop_response" or request.transport is None or request.transport.is_closing():
            return self._hang_up(request)
        if action == "corrupt":
            middle = len(response.body) // 2
            response.body = response.body[:middle] + bytes([response.body[middle] ^ 1]) + response.body[middle + 1 :]
        if action == "cut_response":
            partial = web.StreamResponse(status=response.status, headers=response.headers)
            partial.content_length = len(response.body)
            await partial.prepare(request)
            await partial.write(response.body[:value])
            return self._hang_up(request)
        return response

    @staticmethod
    def _hang_up(request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.close()
        return web.Response(status=499)
