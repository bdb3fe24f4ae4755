"""Where large files lie: the second origin, with LFS (PUT to signed addresses) and Xet (xorbs, shards, reconstruction).

Xet cuts files into chunks, packs new ones into "xorbs", and sends a "shard" that says of which chunks a file is made.
The formats are those that hf_xet 1.8 sends and takes. What came by Xet is unpacked at the commit, with hf_xet's own
reader, and its sha256 is checked: the Hub's blobs are whole files however they came, and a client without Xet can
download them all.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from .store import HubError, Repo

if TYPE_CHECKING:
    from .server import LocalHub

ROW, NO_MORE_FILES = 48, b"\xff" * 32
HAS_SHA256, HAS_CHECKS = 1 << 30, 1 << 31


def byte_range(request: web.Request, size: int) -> tuple[int, int]:
    """First and last byte that the request asks for, of `size`."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    first, last = (int(found[1]), min(int(found[2] or size), size - 1)) if found else (0, size - 1)
    if found and first >= size:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return first, last


def ranged(request: web.Request, path: Path, headers: dict[str, str]) -> web.Response:
    """The content of a file, or the part of it that was asked for."""
    body, headers = path.read_bytes(), {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | headers
    first, last = byte_range(request, len(body))
    if "Range" not in request.headers:
        return web.Response(body=body, headers=headers)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
    return web.Response(status=206, body=body[first : last + 1], headers=headers)


def hex_hash(data: bytes) -> str:
    """Xet's way to write a hash: four little-endian numbers of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def read_shard(data: bytes):
    """(file hash, sha256 or None, [(xorb hash, bytes when unpacked, first chunk, chunk after the last)]) per file."""
    rows = (data[at : at + ROW] for at in range(ROW, len(data), ROW))  # the first row is the shard's header
    for row in rows:
        if row[:32] == NO_MORE_FILES:
            return
        flags, count = struct.unpack("<II", row[32:40])
        terms = []
        for term in (next(rows) for _ in range(count)):
            _, unpacked, first, after = struct.unpack("<4I", term[32:])
            terms.append((hex_hash(term[:32]), unpacked, first, after))
        for _ in range(count if flags & HAS_CHECKS else 0):
            next(rows)
        yield hex_hash(row[:32]), hex_hash(next(rows)[:32]) if flags & HAS_SHA256 else None, terms


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each chunk of a xorb begins, and where the last one ends."""
    offsets = [0]
    while offsets[-1] + 8 <= len(xorb) and not xorb.startswith(b"XETBLOB", offsets[-1]):
        at = offsets[-1]
        offsets.append(at + 8 + int.from_bytes(xorb[at + 1 : at + 4], "little"))
    return offsets


class Storage:
    """Signed addresses, LFS and Xet over the blobs of a hub's store."""

    def __init__(self, hub: LocalHub):
        self.hub, self.port = hub, 0
        self.xorbs, self.shards = hub.root / "xet" / "xorbs", hub.root / "xet" / "files"
        self.signatures: dict[str, tuple] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.xet_token_of_clients, self.own_token = secrets.token_hex(), secrets.token_hex()
        self.xet_hashes = {}  # sha256 -> Xet's hash of the same file
        for path in self.shards.glob("*"):
            self.xet_hashes[json.loads(path.read_text())["sha256"]] = path.name

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_put("/put/{sha256}", self.put)
        router.add_post("/complete/{sha256}", self.complete)
        router.add_get("/get/{sha256}", self.get)
        router.add_post("/cas/v1/xorbs/{prefix}/{hash}", self.put_xorb)
        router.add_post("/cas/v1/shards", self.put_shard)
        router.add_post("/cas/shards", self.put_shard)
        router.add_get("/cas/v1/reconstructions/{hash}", self.reconstruction)
        router.add_get("/cas/xorb/{hash}", self.get_xorb)

    def sign(self, act: str, sha256: str, part: int = 0) -> str:
        signature = secrets.token_hex()
        self.signatures[signature] = (act, sha256, part)
        return f"{self.url}/{act}/{sha256}?signature={signature}"

    def _signed(self, request: web.Request, act: str) -> tuple[str, int]:
        """The sha256 and the number of the part that the request's address was signed for."""
        signed_for = self.signatures.get(request.query.get("signature", ""))
        if signed_for is None or signed_for[:2] != (act, request.match_info["sha256"]):
            raise HubError(403, "The address is badly signed")
        return signed_for[1:]

    def upload_action(self, sha256: str, size: int) -> dict:
        """What LFS tells a client to do with an object that is not here yet."""
        if size <= self.hub.multipart_above:
            return {"href": self.sign("put", sha256), "header": {}}
        numbers = range(1, -(-size // self.hub.part_bytes) + 1)
        header = {f"{number:05d}": self.sign("put", sha256, number) for number in numbers}
        header["chunk_size"] = str(self.hub.part_bytes)
        return {"href": self.sign("complete", sha256), "header": header}

    async def put(self, request: web.Request) -> web.Response:
        (sha256, part), data = self._signed(request, "put"), await request.read()
        if part:
            self.parts[sha256, part] = data
        else:
            self._accept(sha256, data)
        return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def complete(self, request: web.Request) -> web.Response:
        (sha256, _), asked = self._signed(request, "complete"), await request.json()
        self._accept(sha256, b"".join(self.parts.pop((sha256, part["partNumber"])) for part in asked["parts"]))
        return web.json_response({})

    def _accept(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HubError(400, "BadDigest: not the content that was announced")
        self.hub.store.add_blob(data)

    async def get(self, request: web.Request) -> web.Response:
        sha256, _ = self._signed(request, "get")
        return ranged(request, self.hub.store.blob(sha256), {"ETag": f'"{sha256}"'})

    async def xet_token(self, request: web.Request, repo: Repo) -> web.Response:
        if not self.hub.xet:
            raise HubError(404, "This Hub has no Xet")
        expires, url = int(time.time()) + 3600, f"{self.url}/cas"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Token-Expiration": str(expires)}
        headers["X-Xet-Access-Token"] = self.xet_token_of_clients
        token = {"casUrl": url, "exp": expires, "accessToken": self.xet_token_of_clients}
        return web.json_response(token, headers=headers)

    def is_own(self, request: web.Request) -> bool:
        """Whether it is this process that reads, to unpack: such requests are not logged and get no faults."""
        return self.own_token in (request.headers.get("Authorization", "")[7:], request.query.get("own"))

    def _check_xet_token(self, request: web.Request) -> None:
        request["auth"] = "xet"
        if request.headers.get("Authorization") not in (
            f"Bearer {self.xet_token_of_clients}",
            f"Bearer {self.own_token}",
        ):
            raise HubError(401, "Bad Xet token")

    async def put_xorb(self, request: web.Request) -> web.Response:
        self._check_xet_token(request)
        path = self.xorbs / request.match_info["hash"]
        new = not path.exists()
        self.hub.store.write(path, await request.read())
        return web.json_response({"was_inserted": new})

    async def put_shard(self, request: web.Request) -> web.Response:
        self._check_xet_token(request)
        for file_hash, sha256, terms in read_shard(await request.read()):
            if not all((self.xorbs / xorb).exists() for xorb, *_ in terms):
                raise HubError(400, "The shard names a xorb that was not uploaded")
            self.hub.store.write(self.shards / file_hash, json.dumps({"sha256": sha256, "terms": terms}).encode())
            self.xet_hashes[sha256] = file_hash
        return web.json_response({"result": 1})

    def _terms(self, file_hash: str) -> list:
        if not (self.shards / file_hash).exists():
            raise HubError(404, "Unknown file")
        return json.loads((self.shards / file_hash).read_text())["terms"]

    async def reconstruction(self, request: web.Request) -> web.Response:
        """Of which chunks the asked bytes are made, and where these can be fetched."""
        self._check_xet_token(request)
        all_terms = self._terms(request.match_info["hash"])
        first, last = byte_range(request, sum(unpacked for _, unpacked, *_ in all_terms))
        terms, spans, at, skipped = [], {}, 0, 0
        for xorb, unpacked, begin, end in all_terms:
            if at + unpacked > first and at <= last:
                skipped = skipped if terms else first - at
                terms.append({"hash": xorb, "unpacked_length": unpacked, "range": {"start": begin, "end": end}})
                spans.setdefault(xorb, []).append((begin, end))
            at += unpacked
        own = f"?own={self.own_token}" if self.is_own(request) else ""
        fetch = {}
        for xorb, ranges in spans.items():
            offsets, merged = chunk_offsets((self.xorbs / xorb).read_bytes()), []
            for begin, end in sorted(ranges):  # the client wants them disjoint
                if merged and begin <= merged[-1][1]:
                    merged[-1][1] = max(end, merged[-1][1])
                else:
                    merged.append([begin, end])
            fetch[xorb] = [
                {
                    "range": {"start": begin, "end": end},
                    "url": f"{self.url}/cas/xorb/{xorb}{own}",
                    "url_range": {"start": offsets[begin], "end": offsets[end] - 1},
                }
                for begin, end in merged
            ]
        return web.json_response({"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch})

    async def get_xorb(self, request: web.Request) -> web.Response:
        return ranged(request, self.xorbs / request.match_info["hash"], {})

    async def unpack(self, sha256: str) -> None:
        """Makes a blob of a file that came by Xet, if one did and is none yet."""
        if sha256 in self.xet_hashes and not self.hub.store.blob(sha256).exists():
            data = await asyncio.to_thread(self._unpacked, self.xet_hashes[sha256])
            self._accept(sha256, data)

    def _unpacked(self, file_hash: str) -> bytes:
        import hf_xet

        about = hf_xet.XetFileInfo(file_hash, sum(unpacked for _, unpacked, *_ in self._terms(file_hash)))
        expires = int(time.time()) + 3600
        with tempfile.TemporaryDirectory(dir=self.hub.root / "tmp") as folder:
            with hf_xet.XetSession().new_file_download_group(
                endpoint=f"{self.url}/cas", token=self.own_token, token_expiry_unix_secs=expires
            ) as group:
                group.start_download_file(about, f"{folder}/file")
            return Path(folder, "file").read_bytes()
