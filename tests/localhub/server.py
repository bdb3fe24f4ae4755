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
from .store import HubError, Repo, Store


class User(NamedTuple):
    name: str
    role: str
    """Of the token: "write" or "read"."""
    organizations: dict[str, str]


USERS = {
    "hf_alice_write": User("alice", "write", {"acme": "write"}),
    "hf_alice_read": User("alice", "read", {"acme": "write"}),
    "hf_bob_write": User("bob", "write", {"acme": "read"}),
}


class Message(NamedTuple):
    """A commit as a test looks at it."""

    id: str
    message: str


class LocalHub:
    """A Hub over the folder `root`, on free ports of 127.0.0.1. A context manager, or `start()` and `stop()`.

    `xet` serves large files by Xet, otherwise by LFS. LFS files of more than `multipart_above` bytes are uploaded in
    parts of `part_bytes`; other files of more than `lfs_above` bytes count as large, whatever their name.
    """

    def __init__(
        self,
        root: Path | str,
        xet: bool = False,
        *,
        port: int = 0,
        lfs_above: int = 10 * 2**20,
        multipart_above: int = 6 * 10**6,
        part_bytes: int = 5 * 10**6,
    ):
        self.root, self.xet, self.port = Path(root), xet, port
        self.lfs_above, self.multipart_above, self.part_bytes = lfs_above, multipart_above, part_bytes
        self.store = Store(self.root)
        self.storage = Storage(self)
        self.faults: list[dict] = []
        self.log: list[dict] = []
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, token: str | None = "hf_alice_write") -> dict[str, str]:
        """Environment variables that make the Hugging Face libraries of a process use this Hub; no token: anonymous."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",  # the client uploads by LFS only if told to
            "NO_PROXY": "127.0.0.1",
        }
        # With its own settings hf-xet tries for five minutes.
        retries = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms"}
        return variables | (retries if self.xet else {})

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Message]:
        """The commits of a branch, newest first: `id` and `message` (title, and description after an empty line)."""
        history = self.store.repos[repo_type, repo_id].history(revision)
        return [Message(c.id, f"{c.title}\n\n{c.message}".strip()) for c in history]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The files of a revision as the Hub holds them: path -> content."""
        tree = self.store.repos[repo_type, repo_id].commit(revision).tree
        return {path: self.store.blob(entry.sha256).read_bytes() for path, entry in sorted(tree.items())}

    def requests(self, pattern: str = "") -> list[dict]:
        """The requests so far whose "METHOD path" has `pattern` (a regular expression) in it, in order of their ends.

        Keys: method, path, port ("hub" or "storage"), status (negative: it was not told to the client), auth (the
        user's name; "header" for a token that came without being asked for; "-"), fault, range, ms.
        """
        return [entry for entry in list(self.log) if re.search(pattern, f"{entry['method']} {entry['path']}")]

    def fault(
        self,
        pattern: str,
        *,
        skip: int = 0,
        times: int = 1,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        cut_request: int | None = None,
        drop_response: bool = False,
        cut_response: int | None = None,
        corrupt: bool = False,
        delay: float | None = None,
    ) -> dict:
        """Makes requests whose "METHOD path" has `pattern` in it go wrong: the first `skip` pass, the next `times` don't.

        Exactly one of:
          status         is answered, with `headers`; the request has no effect
          cut_request    bytes of the request's body are read, then the connection is closed; no effect
          drop_response  the request is carried out (a commit is applied), then the connection is closed
          cut_response   bytes of the response's body are sent, then the connection is closed
          corrupt        the byte in the middle of the response's body is changed
          delay          seconds pass first; a request whose client has gone by then has no effect

        Returns the rule; its "fired" counts the requests that were hit.
        """
        actions = {
            "status": status,
            "cut_request": cut_request,
            "drop_response": drop_response or None,
            "cut_response": cut_response,
            "corrupt": corrupt or None,
            "delay": delay,
        }
        chosen = [(name, value) for name, value in actions.items() if value is not None]
        if len(chosen) != 1:
            raise ValueError(f"one of {', '.join(actions)}, not {[name for name, _ in chosen]}")
        [(action, value)] = chosen
        rule = {"pattern": pattern, "action": action, "value": value, "headers": headers}
        rule |= {"skip": skip, "times": times, "seen": 0, "fired": 0}
        self.faults.append(rule)
        return rule

    def reset(self) -> None:
        """Forgets the faults and the log; the repos stay."""
        self.faults.clear()
        self.log.clear()

    def start(self) -> LocalHub:
        ready = threading.Event()

        async def serve():
            self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
            runners = [
                await self._listen("hub", self.port, Api(self)),
                await self._listen("storage", 0, self.storage),
            ]
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

    async def _listen(self, name: str, port: int, part: Api | Storage) -> web.AppRunner:
        application = web.Application(client_max_size=2**31, middlewares=[self._answer])
        application["name"] = name
        part.add_routes(application.router)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    def stop(self) -> None:
        if self._thread:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)
            self._thread = None

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def user(self, request: web.Request) -> User | None:
        """Who asks: None without a token; an unknown token is refused."""
        header = request.headers.get("Authorization")
        if header is None:
            return None
        user = USERS.get(header.removeprefix("Bearer ").strip())
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        request["auth"] = user.name
        return user

    def known_user(self, request: web.Request) -> User:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    @staticmethod
    def may(user: User | None, act: str, namespace: str) -> bool:
        """Whether `user` may "read" what is private in `namespace`, or "write" there."""
        if user is None or (act == "write" and user.role != "write"):
            return False
        return user.name == namespace or user.organizations.get(namespace) in (act, "write")

    def repo(self, request: web.Request, repo_type: str, act: str = "read") -> Repo:
        """The repo that the request's path names, if the one who asks may see it and do `act`."""
        user, name = self.user(request), request.match_info["name"].removesuffix(".git")
        repo = self.store.repos.get((repo_type, f"{request.match_info['namespace']}/{name}"))
        if repo is None or (repo.private and not self.may(user, "read", repo.namespace)):
            # huggingface.co gives the 401 no error code, and the client takes it for "not found" at https:// only.
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if act == "write" and not self.may(user, "write", repo.namespace):
            if user is None:
                raise HubError(401, "Invalid username or password.")
            raise HubError(403, f"Authorization error: no write access to {repo.id}")
        return repo

    def _take_fault(self, what: str) -> dict:
        for rule in list(self.faults):
            if re.search(rule["pattern"], what):
                rule["seen"] += 1
                if rule["skip"] < rule["seen"] <= rule["skip"] + rule["times"]:
                    rule["fired"] += 1
                    return rule
        return {"action": None}

    @web.middleware
    async def _answer(self, request: web.Request, handler) -> web.StreamResponse:
        """Handles a request, with the fault that it is due, and writes the log."""
        if self.storage.is_own(request):
            return await handler(request)
        began, fault, status = time.monotonic(), self._take_fault(f"{request.method} {request.path}"), -1
        try:
            response = await self._faulty(request, handler, fault)
            status = response.status
            return response
        finally:
            token = "header" if "Authorization" in request.headers else "-"
            self.log.append(
                {
                    "method": request.method,
                    "path": request.path,
                    "port": request.app["name"],
                    "status": status,
                    "auth": request.get("auth", token),
                    "fault": fault["action"],
                    "range": request.headers.get("Range"),
                    "ms": round(1000 * (time.monotonic() - began)),
                }
            )

    async def _faulty(self, request: web.Request, handler, fault: dict) -> web.StreamResponse:
        action, value = fault["action"], fault.get("value")
        if action == "delay":
            await asyncio.sleep(value)
            if request.transport is None or request.transport.is_closing():
                return self._hang_up(request)
        if action == "cut_request":
            read = 0
            while read < value and (data := await request.content.read(value - read)):
                read += len(data)
            return self._hang_up(request)
        try:
            if action == "status":
                await request.read()
                raise HubError(value, "a fault made on purpose", headers=fault["headers"])
            response = await handler(request)
        except HubError as error:
            response = web.json_response({"error": error.message}, status=error.status, headers=error.headers)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason}, status=error.status)
        if action == "drop_response":
            return self._hang_up(request)
        if action in ("corrupt", "cut_response") and response.body:
            return await self._damage(request, response, action, value)
        return response

    @staticmethod
    async def _damage(request: web.Request, response: web.Response, action: str, value: int) -> web.StreamResponse:
        body = bytearray(response.body)
        if action == "corrupt":
            body[len(body) // 2] ^= 1
            response.body = bytes(body)
            return response
        partial = web.StreamResponse(status=response.status, headers=response.headers)
        partial.content_length = len(body)
        await partial.prepare(request)
        await partial.write(body[:value])
        return LocalHub._hang_up(request)

    @staticmethod
    def _hang_up(request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.close()
        return web.Response(status=499)
