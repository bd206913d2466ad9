"""The dashboard's files over HTTP: those that were packaged, whole or not at all, and nothing else of this machine."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path

import pytest

from gateway.admin.browser import PAGE_CSP
from gateway.admin.pages import TYPES, static_files
from tests.support.admin_desk import AdminSide, admin_side
from tests.support.client import connect

STATIC = Path(str(files("gateway.dashboard").joinpath("static")))


def on_disk() -> set[str]:
    return {str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.is_file()}


async def test_every_packaged_file_is_answered_as_it_is(tmp_path: Path) -> None:
    known = static_files(files("gateway.dashboard").joinpath("static"))
    assert on_disk() == set(known)
    async with admin_side(tmp_path) as side:
        for path in known:
            url = "/admin/" if path == "index.html" else f"/admin/static/{path}"
            answer = await side.client.get(url)
            assert answer.status_code == 200, path
            assert answer.content == (STATIC / path).read_bytes()
            assert answer.headers["content-type"] == TYPES[path.rpartition(".")[2]]
            assert answer.headers["content-security-policy"] == PAGE_CSP
            assert answer.headers["cache-control"] == "no-cache"


async def test_a_browser_that_has_a_file_is_told_so(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        first = await side.client.get("/admin/static/js/main.js")
        tag = first.headers["etag"]
        for given in (tag, f"W/{tag}", f'"other", {tag}'):
            again = await side.client.get("/admin/static/js/main.js", headers={"if-none-match": given})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
        other = await side.client.get("/admin/static/js/main.js", headers={"if-none-match": '"other"'})
        assert other.status_code == 200
        head = await side.client.head("/admin/")
        assert (head.status_code, head.content) == (200, b"")


async def test_what_is_worth_it_is_packed_for_those_who_take_it(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        plain = await side.client.get("/admin/static/vendor/uPlot.mjs", headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers
        async with side.client.stream(
            "GET", "/admin/static/vendor/uPlot.mjs", headers={"accept-encoding": "br, gzip"}
        ) as packed:
            assert packed.headers["content-encoding"] == "gzip"
            raw = b"".join([piece async for piece in packed.aiter_raw()])
        assert gzip.decompress(raw) == plain.content
        assert len(raw) < len(plain.content) / 2


@pytest.mark.parametrize(
    "path",
    [
        "/admin/static/",
        "/admin/static/index.html",
        "/admin/static/nothing.js",
        "/admin/static/js",
        "/admin/static/js/",
        "/admin/static/../pages.py",
        "/admin/static/../../admin/pages.py",
        "/admin/static/%2e%2e/%2e%2e/admin/pages.py",
        "/admin/static/..%2fadmin%2fpages.py",
        "/admin/static//etc/passwd",
        "/admin/static/%2fetc%2fpasswd",
        "/admin/static/js/main.js%00",
        "/admin/static/js/main.js/",
        "/admin/static/js\\main.js",
        "/admin/static/JS/MAIN.JS",
    ],
)
async def test_nothing_else_is_reachable(tmp_path: Path, path: str) -> None:
    async with admin_side(tmp_path) as side:
        assert await _status(side, path) in (400, 404)


async def test_the_short_address_leads_to_the_dashboard(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        answer = await side.client.get("/admin")
        assert (answer.status_code, answer.headers["location"]) == (308, "/admin/")


async def _status(side: AdminSide, path: str) -> int:
    """Of a path that is sent as it stands."""
    host, port = side.url.removeprefix("http://").split(":")
    async with connect(host, int(port)) as client:
        await client.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        return (await client.reply()).status
