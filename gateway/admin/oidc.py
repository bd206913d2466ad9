"""OpenID Connect, the part that a gateway needs: authorization code with PKCE, and an ID token that is checked.

Follows OpenID Connect Core 1.0 (3.1) and Discovery 1.0, RFC 7636 (PKCE) and RFC 9207 (`iss` in the answer). Signatures
and their keys are joserfc's (https://jose.authlib.org), by the maintainers of Authlib, whose successor for this it is;
what a token must say is checked here, where one can read it. Nothing of the provider's is believed but what its own
address serves over TLS and what its keys have signed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from gateway.admin.audit_text import printable
from gateway.config.operators import Oidc
from gateway.config.values import is_loopback
from gateway.policy import Who

ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"),
    *("Ed25519", "EdDSA"),
)
"""Signatures with a public key only: `none` says nothing, and HS256 with a key that everybody can fetch no more."""
LEEWAY_S = 60
"""By which clocks may differ."""
ANSWER_WITHIN_S = 10.0
MAX_ANSWER_BYTES = 1_048_576
DISCOVERY_S = 3600.0
KEYS_EVERY_S = 30.0
"""Keys are fetched anew for a token of a key that is not known, but not more often."""
PENDING_S = 600.0
MAX_PENDING = 1000


class OidcError(Exception):
    """It did not work; `code` is what the person is told, the text is for the log and has no secret in it."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Person:
    """Whom the provider says somebody is, and what that allows."""

    name: str
    role: Who


@dataclass(frozen=True, slots=True)
class Pending:
    """A login that somebody has begun."""

    nonce: str
    verifier: str
    browser: bytes
    """Digest of what the browser that began it keeps."""
    began_at: float


class Attempts:
    """Logins that have been begun: each can be finished once, by the browser that began it, within ten minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: dict[str, Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def begin(self) -> tuple[str, str, Pending]:
        """The state for the provider, what the browser is to keep, and the rest."""
        state, kept = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        pending = Pending(secrets.token_urlsafe(32), secrets.token_urlsafe(48), _digest(kept), self._clock())
        while len(self._pending) >= MAX_PENDING:
            del self._pending[next(iter(self._pending))]
        self._pending[state] = pending
        return state, kept, pending

    def finish(self, state: str, kept: str | None) -> Pending:
        """Raises `OidcError` for what was not begun, or elsewhere, or too long ago, or is finished already."""
        pending = self._pending.get(state)
        if pending is None or kept is None or not hmac.compare_digest(pending.browser, _digest(kept)):
            raise OidcError("expired", "the state is unknown, used, or another browser's")
        del self._pending[state]
        if self._clock() - pending.began_at > PENDING_S:
            raise OidcError("expired", "the login was begun too long ago")
        return pending


class Provider:
    """One identity provider, as its own discovery document describes it."""

    def __init__(self, settings: Oidc, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since 1970."""
        self._settings = settings
        self._clock = clock
        self._fetching = asyncio.Lock()
        self._found: dict[str, Any] = {}
        self._found_at = float("-inf")
        self._keys: Any = None
        self._keys_at = float("-inf")

    async def address(self, state: str, pending: Pending) -> str:
        """Where somebody logs in. Raises `OidcError`."""
        endpoint = (await self._discovered())["authorization_endpoint"]
        challenge = base64.urlsafe_b64encode(hashlib.sha256(pending.verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": self._settings.client_id,
            "redirect_uri": self._settings.redirect_url,
            "scope": " ".join(self._settings.scopes),
            "state": state,
            "nonce": pending.nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        return f"{endpoint}{'&' if urlsplit(endpoint).query else '?'}{urlencode(query)}"

    async def person(self, code: str, pending: Pending) -> Person:
        """Who has logged in. Raises `OidcError`."""
        token = await self._exchange(code, pending.verifier)
        claims = await self._verified(token)
        self.check(claims, pending.nonce)
        return person_of(claims, self._settings)

    # -- what the provider says

    async def _exchange(self, code: str, verifier: str) -> str:
        """The ID token for a code."""
        found = await self._discovered()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._settings.redirect_url,
            "code_verifier": verifier,
        }
        headers = {}
        secret, client = self._settings.client_secret, self._settings.client_id
        methods = found.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        if secret is not None and "client_secret_basic" in methods:
            pair = f"{quote(client, safe='')}:{quote(secret.get_secret_value(), safe='')}"
            headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        else:
            form["client_id"] = client
            if secret is not None:
                form["client_secret"] = secret.get_secret_value()
        answer = await _fetch("POST", found["token_endpoint"], form, headers)
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise OidcError("refused", "the provider gave no ID token")
        return token

    async def _verified(self, token: str) -> Mapping[str, Any]:
        """What a token says, if one of the provider's keys has signed it."""
        from joserfc import jwt
        from joserfc.errors import JoseError

        reason = ""
        for again in (False, True):
            keys = await self._key_set(again)
            try:
                return jwt.decode(token, keys, algorithms=ALGORITHMS).claims
            except (JoseError, ValueError) as error:  # ValueError: no key of that name
                reason = type(error).__name__
        raise OidcError("refused", f"the ID token is not signed by the provider ({reason})")

    def check(self, claims: Mapping[str, Any], nonce: str) -> None:
        """Whether a token is meant for us, for this login, and now. Raises `OidcError`. OIDC Core 3.1.3.7."""
        client, now = self._settings.client_id, self._clock()
        audience = claims.get("aud")
        audiences = [audience] if isinstance(audience, str) else audience if isinstance(audience, list) else []
        if claims.get("iss") != self._settings.issuer:
            raise OidcError("refused", "the ID token is another issuer's")
        if client not in audiences or (len(audiences) > 1 and "azp" not in claims):
            raise OidcError("refused", "the ID token is for another client")
        if claims.get("azp", client) != client:
            raise OidcError("refused", "the ID token was issued to another client")
        expires, issued, begins = _time(claims.get("exp")), _time(claims.get("iat")), _time(claims.get("nbf", 0))
        if expires is None or issued is None or begins is None:
            raise OidcError("refused", "the ID token does not say when it is valid")
        if now >= expires + LEEWAY_S:
            raise OidcError("refused", "the ID token has expired")
        if max(issued, begins) > now + LEEWAY_S:
            raise OidcError("refused", "the ID token is from the future")
        given = claims.get("nonce")
        if not isinstance(given, str) or not hmac.compare_digest(given.encode(), nonce.encode()):
            raise OidcError("refused", "the ID token is of another login")
        if not isinstance(claims.get("sub"), str) or not claims["sub"]:
            raise OidcError("refused", "the ID token does not say of whom it is")

    async def _discovered(self) -> dict[str, Any]:
        async with self._fetching:
            if time.monotonic() - self._found_at > DISCOVERY_S:
                found = await _fetch("GET", f"{self._settings.issuer.rstrip('/')}/.well-known/openid-configuration")
                if found.get("issuer") != self._settings.issuer:
                    raise OidcError("unavailable", "the provider's discovery document names another issuer")
                for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
                    _require_secure(name, found.get(name))
                self._found, self._found_at = found, time.monotonic()
            return self._found

    async def _key_set(self, again: bool) -> Any:
        found = await self._discovered()
        async with self._fetching:
            age_s = time.monotonic() - self._keys_at
            if self._keys is None or age_s > DISCOVERY_S or (again and age_s > KEYS_EVERY_S):
                self._keys = _imported(await _fetch("GET", found["jwks_uri"]))
                self._keys_at = time.monotonic()
            return self._keys


def person_of(claims: Mapping[str, Any], settings: Oidc) -> Person:
    """Who somebody is and what they may. Raises `OidcError` for whom nothing is said: nobody is let in by default."""
    email, verified = claims.get("email"), claims.get("email_verified") is True
    if settings.allowed_domains:
        domain = email.rpartition("@")[2].lower() if isinstance(email, str) and verified else None
        if domain not in {each.lower() for each in settings.allowed_domains}:
            raise OidcError("no_role", "their verified e-mail address is in none of admin.oidc.allowed_domains")
    values = claim_at(claims, settings.role_claim)
    given = [values] if isinstance(values, str) else values if isinstance(values, list) else []
    roles = [Who(settings.roles[each]) for each in given if isinstance(each, str) and each in settings.roles]
    if not roles:
        raise OidcError("no_role", f"their claim {settings.role_claim} has no value of admin.oidc.roles")
    name = claim_at(claims, settings.name_claim)
    if settings.name_claim == "email" and not verified:  # anybody may claim another's address
        name = None
    shown = printable(name if isinstance(name, str) and name else claims["sub"], 120)
    return Person(f"oidc:{shown}", max(roles, key=lambda role: role.rank))


def claim_at(claims: Mapping[str, Any], path: str) -> Any:
    """A claim by its name, else by the path that its dots make of it; None where there is none.

    >>> claim_at({"realm_access": {"roles": ["a"]}}, "realm_access.roles")
    ['a']
    """
    if path in claims:
        return claims[path]
    value: Any = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


async def _fetch(
    method: str, url: str, form: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A JSON object. No redirects, no proxies or credentials of the environment; what was sent is in no error."""
    import httpx2

    checking = await asyncio.to_thread(ssl.create_default_context)  # reads all certificates: some 20 ms
    body = bytearray()
    try:
        async with (
            asyncio.timeout(ANSWER_WITHIN_S),
            httpx2.AsyncClient(trust_env=False, follow_redirects=False, verify=checking) as client,
            client.stream(method, url, data=form, headers={"accept": "application/json", **(headers or {})}) as answer,
        ):
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise OidcError("unavailable", f"{urlsplit(url).netloc} answers with too much")
            status = answer.status_code
    except (httpx2.HTTPError, OSError) as error:  # TimeoutError among them
        raise OidcError("unavailable", f"{urlsplit(url).netloc} does not answer: {type(error).__name__}") from None
    if status != 200:
        code = "refused" if method == "POST" and 400 <= status < 500 else "unavailable"
        raise OidcError(code, f"{urlsplit(url).netloc} answers {status}")
    try:
        return msgspec.json.decode(bytes(body), type=dict[str, Any])
    except msgspec.MsgspecError:
        raise OidcError("unavailable", f"{urlsplit(url).netloc} answers with something that is no JSON") from None


def _imported(found: Mapping[str, Any]) -> Any:
    """The keys for signatures; one that cannot be used is left out."""
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry, KeySet

    keys = []
    for each in found.get("keys") or ():
        if isinstance(each, dict) and each.get("use", "sig") == "sig" and each.get("kty") in ("RSA", "EC", "OKP"):
            try:
                keys.append(JWKRegistry.import_key(each))
            except (JoseError, ValueError, TypeError, KeyError):
                continue
    if not keys:
        raise OidcError("unavailable", "the provider has no keys that can be used")
    return KeySet(keys)


def _require_secure(name: str, url: object) -> None:
    parts = urlsplit(url) if isinstance(url, str) else None
    local = parts is not None and parts.scheme == "http" and is_loopback(parts.hostname or "")
    if parts is None or not (local or (parts.scheme == "https" and parts.hostname)):
        raise OidcError("unavailable", f"the provider's {name} is no https address")


def _time(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("latin-1", "replace")).digest()
