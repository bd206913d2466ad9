"""What browsers say of where a request comes from, and what they are told about answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import Message, Send

from gateway.errors import InvalidRequest

CSRF_HEADER = b"x-tidegate-csrf"
SAFE_METHODS = ("GET", "HEAD")
PAGE_CSP = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; font-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; frame-src 'none'; "
    "worker-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing inline, nothing from elsewhere, in no frame, and no text that becomes markup or a script (Trusted Types)."""
_DATA_CSP = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
"""For answers that are no pages, should a browser ever be made to show one as such."""
DEFAULTS: Mapping[bytes, bytes] = {
    b"cache-control": b"no-store",
    b"content-security-policy": _DATA_CSP.encode(),
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}
"""Headers of every answer of the admin listener that does not have its own."""


class CrossSiteRequest(InvalidRequest):
    """A browser asks for somebody who has logged in, and not for a page of this listener's."""

    status = 403
    code = "cross_site_request"


def cross_site_problem(
    method: str, headers: Iterable[tuple[bytes, bytes]], *, origin_needed: bool = True
) -> CrossSiteRequest | None:
    """Why a request with a session is not one of this listener's own pages'; None when it is.

    `Sec-Fetch-Site` cannot be set by a page (https://www.w3.org/TR/fetch-metadata/); where a browser does not send it,
    `Origin` has to be this listener's own. What changes something needs a header besides, which a form cannot set and
    a foreign page only after having been allowed to. With `origin_needed` false a client that sends neither, and so is
    no browser, passes.
    """
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in (b"sec-fetch-site", b"origin", b"host", CSRF_HEADER):
            found.setdefault(name, []).append(value)
    site, origin = found.get(b"sec-fetch-site"), found.get(b"origin")
    if method in SAFE_METHODS:
        if site in (None, [b"same-origin"], [b"none"]):  # none: somebody has typed the address
            return None
        return CrossSiteRequest("A page of another site asks here with your session.")
    if site is not None:
        own = site == [b"same-origin"]
    elif origin is not None:
        scheme, _, rest = origin[0].partition(b"://")
        own = len(origin) == 1 and scheme in (b"http", b"https") and [rest] == found.get(b"host")
    else:
        own = not origin_needed
    if not own:
        return CrossSiteRequest("What a browser changes here has to come from a page of this listener.")
    if found.get(CSRF_HEADER) != [b"1"]:
        return CrossSiteRequest("A session needs the header x-tidegate-csrf: 1 to change something.", param="header")
    return None


def hardened(send: Send) -> Send:
    """The same, with `DEFAULTS`."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[Any] = list(message.get("headers", ()))
            present = {name for name, _ in headers}
            headers += [(name, value) for name, value in DEFAULTS.items() if name not in present]
            message = {**message, "headers": headers}
        await send(message)

    return with_headers
