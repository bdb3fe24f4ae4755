"""Where large files lie: the second origin, which takes them by LFS or by Xet. It needs no user's token.

Xet cuts a file into chunks, sends the chunks that are new packed into a "xorb", and then a "shard", which says of which
chunks of which xorbs the file is made. The formats are those of hf_xet 1.8. Chunks must come uncompressed (`env()` asks
for it), so that a shard's files can be put together here: they become blobs like all others, checked by their sha256.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from .store import HubError, Repo

if TYPE_CHECKING:
    from .server import LocalHub

ROW, AFTER_FILES = 48, b"\xff" * 32
HAS_SHA256, HAS_CHECKS = 1 << 30, 1 << 31


def byte_range(request: web.Request, size: int) -> tuple[int, int]:
    """The first byte that the request asks for, and the one after the last, of `size`."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "bytes=0-"))
    first, after = int(found[1]), min(int(found[2] or size) + 1, size)
    if first and first >= after:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return first, after


def send_file(request: web.Request, path: Path, headers: dict[str, str]) -> web.Response:
    """The content of a file, or the part of it that was asked for."""
    content = path.read_bytes()
    first, after = byte_range(request, len(content))
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | headers
    if "Range" in request.headers:
        headers["Content-Range"] = f"bytes {first}-{after - 1}/{len(content)}"
    return web.Response(status=206 if "Range" in request.headers else 200, body=content[first:after], headers=headers)


def hex_hash(data: bytes) -> str:
    """Xet's way to write a hash: four little-endian numbers of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def read_shard(data: bytes) -> Iterator[tuple[str, str, list[tuple[str, int, int, int]]]]:
    """(hash, sha256, terms) of each file; a term is (xorb, bytes, first chunk, chunk after the last)."""
    rows = (data[at : at + ROW] for at in range(ROW, len(data), ROW))  # the first row is the shard's header
    for row in rows:
        if row.startswith(AFTER_FILES):
            return
        flags, count = struct.unpack("<II", row[32:40])
        terms = [(hex_hash(term[:32]), *struct.unpack("<3I", term[36:])) for term in (next(rows) for _ in range(count))]
        for _ in range(count if flags & HAS_CHECKS else 0):
            next(rows)
        if not flags & HAS_SHA256:
            raise HubError(400, "The shard lacks a file's sha256")
        yield hex_hash(row[:32]), hex_hash(next(rows)[:32]), terms


def read_xorb(data: bytes) -> list[bytes]:
    """The chunks of a xorb. Each comes after 8 bytes: version, packed size (3), compression, size (3)."""
    at, chunks = 0, []
    while at + 8 <= len(data) and not data.startswith(b"XETBLOB", at):
        if data[at + 4]:
            raise HubError(400, "A compressed chunk; this Hub needs HF_XET_XORB_COMPRESSION_POLICY=none")
        size = int.from_bytes(data[at + 1 : at + 4], "little")
        chunks.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return chunks


class Storage:
    def __init__(self, hub: LocalHub):
        self.hub, self.store, self.port = hub, hub.store, 0
        self.xorbs, self.parts = hub.root / "xorbs", hub.root / "parts"
        self.terms: dict[str, list[tuple[str, int, int, int]]] = {}  # of files by Xet's hash of them
        self.xet_hashes: dict[str, str] = {}  # by sha256

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_put("/put/{sha256}", self.put)
        router.add_post("/complete/{sha256}", self.complete)
        router.add_get("/get/{sha256}", self.get)
        router.add_post("/cas/v1/xorbs/default/{hash}", self.put_xorb)
        router.add_post("/cas/v1/shards", self.put_shard)
        router.add_get("/cas/v1/reconstructions/{hash}", self.reconstruction)
        router.add_get("/cas/xorb/{hash}", self.get_xorb)

    def upload_action(self, sha256: str, size: int) -> dict:
        """What LFS tells a client to do with an object that is not here yet."""
        url = f"{self.url}/put/{sha256}"
        if size <= self.hub.part_bytes:
            return {"href": url}
        header = {f"{part:05d}": f"{url}?part={part}" for part in range(1, -(-size // self.hub.part_bytes) + 1)}
        return {"href": f"{self.url}/complete/{sha256}", "header": header | {"chunk_size": str(self.hub.part_bytes)}}

    async def put(self, request: web.Request) -> web.Response:
        content, sha256 = await request.read(), request.match_info["sha256"]
        if part := request.query.get("part"):
            self.store.write(self.parts / f"{sha256}.{part}", content)
        else:
            self.store.add_blob(content, sha256)
        return web.Response(headers={"ETag": hashlib.md5(content).hexdigest()})

    async def complete(self, request: web.Request) -> web.Response:
        asked, sha256 = await request.json(), request.match_info["sha256"]
        parts = [self.parts / f"{sha256}.{part['partNumber']}" for part in asked["parts"]]
        self.store.add_blob(b"".join(part.read_bytes() for part in parts), sha256)
        return web.json_response({})

    async def get(self, request: web.Request) -> web.Response:
        sha256 = request.match_info["sha256"]
        return send_file(request, self.store.blob(sha256), {"ETag": f'"{sha256}"'})

    async def xet_token(self, request: web.Request, repo: Repo) -> web.Response:
        if not self.hub.xet:
            raise HubError(404, "This Hub has no Xet")
        expires, url = int(time.time()) + 3600, f"{self.url}/cas"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Token-Expiration": str(expires), "X-Xet-Access-Token": "xet"}
        return web.json_response({"casUrl": url, "exp": expires, "accessToken": "xet"}, headers=headers)

    async def put_xorb(self, request: web.Request) -> web.Response:
        content = await request.read()
        read_xorb(content)
        self.store.write(self.xorbs / request.match_info["hash"], content)
        return web.json_response({"was_inserted": True})

    async def put_shard(self, request: web.Request) -> web.Response:
        for file_hash, sha256, terms in read_shard(await request.read()):
            xorbs = {xorb: read_xorb((self.xorbs / xorb).read_bytes()) for xorb, *_ in terms}
            chunks = [chunk for xorb, _, first, after in terms for chunk in xorbs[xorb][first:after]]
            self.store.add_blob(b"".join(chunks), sha256)
            self.terms[file_hash], self.xet_hashes[sha256] = terms, file_hash
        return web.json_response({"result": 1})

    async def reconstruction(self, request: web.Request) -> web.Response:
        """Of which terms the asked bytes are made, and where their xorbs are."""
        all_terms = self.terms[request.match_info["hash"]]
        first, after = byte_range(request, sum(size for _, size, *_ in all_terms))
        terms, fetch, skip, at = [], {}, 0, 0
        for xorb, size, begin, end in all_terms:
            if at + size > first and at < after:
                skip = skip if terms else first - at
                terms.append({"hash": xorb, "unpacked_length": size, "range": {"start": begin, "end": end}})
                chunks = read_xorb((self.xorbs / xorb).read_bytes())
                bytes_ = {"start": 0, "end": sum(8 + len(chunk) for chunk in chunks) - 1}
                whole = {"range": {"start": 0, "end": len(chunks)}, "url_range": bytes_}
                fetch[xorb] = [whole | {"url": f"{self.url}/cas/xorb/{xorb}"}]
            at += size
        return web.json_response({"offset_into_first_range": skip, "terms": terms, "fetch_info": fetch})

    async def get_xorb(self, request: web.Request) -> web.Response:
        return send_file(request, self.xorbs / request.match_info["hash"], {})
