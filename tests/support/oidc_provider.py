"""A small OpenID provider on this machine: it logs everybody in at once, and lies where it is told to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from gateway.listener import admin_listener, bind_tcp, listen

CLIENT, SECRET = "tidegate", "secret-of-the-client-0123456789"


@dataclass
class OidcProvider:
    """`lies` are claims that replace those of the next tokens, None taking one out."""

    issuer: str = ""
    claims: dict[str, Any] = field(
        default_factory=lambda: {"sub": "u-1", "email": "jo@example.org", "email_verified": True, "groups": ["oncall"]}
    )
    lies: dict[str, Any] = field(default_factory=dict)
    alg: str = "RS256"
    """Or `none`, or `HS256` signed with the text of the public key; `foreign` is RS256 with another key."""
    discovery: dict[str, Any] = field(default_factory=dict)
    """In place of what it says of itself."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """What came to the token endpoint, with its Authorization."""
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "first", "use": "sig"}))
    codes: dict[str, dict[str, str]] = field(default_factory=dict)

    def rotate(self) -> None:
        """Sign with another key from now on, and show only that one."""
        self.key = RSAKey.generate_key(2048, {"kid": secrets.token_hex(4), "use": "sig"})

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._discovery),
                Route("/authorize", self._authorize),
                Route("/token", self._token, methods=["POST"]),
                Route("/keys", self._keys),
            ]
        )

    async def _discovery(self, request: Request) -> Response:
        return JSONResponse(
            {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "jwks_uri": f"{self.issuer}/keys",
                **self.discovery,
            }
        )

    async def _keys(self, request: Request) -> Response:
        unusable = [{"kty": "oct", "k": "AAAA"}, {"kty": "RSA"}, {"kty": "RSA", "use": "enc", "n": "AQAB", "e": "AQAB"}]
        return JSONResponse({"keys": [*unusable, self.key.as_dict(private=False)]})

    async def _authorize(self, request: Request) -> Response:
        query = dict(request.query_params)
        assert query["response_type"] == "code"
        assert query["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(16)
        self.codes[code] = query
        back = urlencode({"code": code, "state": query["state"], "iss": self.issuer})
        return RedirectResponse(f"{query['redirect_uri']}?{back}", 302)

    async def _token(self, request: Request) -> Response:
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        self.asked.append({**form, "authorization": request.headers.get("authorization")})
        begun = self.codes.pop(form["code"], None)  # a code is good once
        pair = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if begun is None or request.headers.get("authorization") != f"Basic {pair}":
            return JSONResponse({"error": "invalid_grant"}, 400)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=")
        if challenge.decode() != begun["code_challenge"] or form["redirect_uri"] != begun["redirect_uri"]:
            return JSONResponse({"error": "invalid_grant"}, 400)
        return JSONResponse({"access_token": "not-for-us", "id_token": self.token(begun["nonce"])})

    def token(self, nonce: str) -> str:
        """An ID token for this login."""
        now = int(time.time())
        truth = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": nonce, **self.claims}
        claims = {name: value for name, value in {**truth, **self.lies}.items() if value is not None}
        if self.alg in ("none", "HS256"):
            head = {"alg": self.alg, "kid": "first"}
            said = ".".join(_base64(msgspec.json.encode(part)) for part in (head, claims))
            signed = hmac.digest(self.key.as_pem(private=False), said.encode(), "sha256")
            return f"{said}.{'' if self.alg == 'none' else _base64(signed)}"
        if self.alg == "foreign":
            return jwt.encode({"alg": "RS256", "kid": "first"}, claims, RSAKey.generate_key(2048))
        return jwt.encode({"alg": self.alg, "kid": self.key.kid}, claims, self.key, algorithms=[self.alg])


@asynccontextmanager
async def oidc_provider() -> AsyncIterator[OidcProvider]:
    provider = OidcProvider()
    sock = bind_tcp("127.0.0.1", 0, "admin.port")
    listen([sock])
    listener = admin_listener(provider.app())
    task = asyncio.create_task(listener.serve([sock]))
    await listener.ready.wait()
    provider.issuer = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield provider
    finally:
        listener.cut()
        listener.should_exit = True
        await task


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def query_of(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
