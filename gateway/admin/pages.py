"""The dashboard's files, as they were packaged: read once, answered from memory. There is no other file to be had.

They are for anyone: what they tell is the same for every gateway of this version. A browser asks each time whether it
has the right one (ETag), so that a new version is seen at once.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.browser import PAGE_CSP
from gateway.errors import RouteNotFound
from gateway.policy import About, GuardedRoute, Who

if TYPE_CHECKING:
    from gateway.admin.desk import Desk

INDEX = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "json": "application/json",
    "md": "text/plain; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "LICENSE": "text/plain; charset=utf-8",
}
"""By what follows the last dot. A file of another kind is not answered with."""
_WORTH_PACKING_BYTES = 1024


@dataclass(frozen=True, slots=True)
class File:
    """One answer, whole."""

    body: bytes
    packed: bytes | None
    """With gzip, where that is shorter."""
    media: str
    etag: str


def static_files(folder: Traversable) -> dict[str, File]:
    """Every file below a folder, by its path in there with slashes."""
    return {path: _file(path, data) for path, data in _below(folder)}


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area."""
    known = static_files(files("gateway.dashboard").joinpath("static"))

    async def index(request: Request) -> Response:
        """The dashboard."""
        return _answer(request, known.get(INDEX))

    async def static(request: Request) -> Response:
        """A file of the dashboard."""
        path = request.path_params["path"]
        return _answer(request, None if path == INDEX else known.get(path))

    async def moved(request: Request) -> Response:
        """To the dashboard."""
        return Response(status_code=308, headers={"location": "/admin/"})

    return [
        GuardedRoute("/admin", moved, Who.ANYONE, methods=["GET"], about=About(status=308)),
        GuardedRoute("/admin/", index, Who.ANYONE, methods=["GET"], about=About(media="text/html")),
        GuardedRoute("/admin/static/{path:path}", static, Who.ANYONE, methods=["GET"], about=About(media="*/*")),
    ]


def _answer(request: Request, file: File | None) -> Response:
    if file is None:
        raise RouteNotFound("The dashboard has no such file.")
    headers = {
        "cache-control": "no-cache",
        "content-security-policy": PAGE_CSP,
        "etag": file.etag,
        "vary": "accept-encoding",
    }
    if file.etag in [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    body = file.body
    if file.packed is not None and _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["content-encoding"] = "gzip"
        body = file.packed
    return Response(body, media_type=file.media, headers=headers)


def _takes_gzip(accepted: str) -> bool:
    """Whether a browser takes gzip; one that says how much it likes it (`gzip;q=0.5`) gets it plain."""
    return "gzip" in [each.strip().lower() for each in accepted.split(",")]


def _file(path: str, data: bytes) -> File:
    packed = gzip.compress(data, 9, mtime=0) if len(data) >= _WORTH_PACKING_BYTES else data
    media = TYPES[path.rpartition(".")[2]]
    return File(data, packed if len(packed) < len(data) else None, media, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def _below(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _below(each, f"{prefix}{each.name}/")
        elif each.name.rpartition(".")[2] in TYPES and not each.name.startswith("."):
            yield prefix + each.name, each.read_bytes()
