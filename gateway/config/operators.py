"""The part of the schema about operators: further tokens with their roles, sessions of the dashboard, and OIDC."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from gateway.config.problems import wrong
from gateway.config.secrets import Secret
from gateway.config.values import Number, Section, Whole, is_loopback

PersonRole = Literal["reader", "operator", "owner"]
Role = Literal["reader", "operator", "owner", "registrar"]
CALLBACK_PATH = "/admin/session/oidc/callback"
LONGEST_SESSION_S = 8 * 3600


def _secure_url(text: str) -> str:
    """https, or http on this machine, where nobody is between."""
    try:
        parts = urlsplit(text)
        fine = bool(parts.hostname) and parts.username is None and not parts.query and not parts.fragment
        secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        _ = parts.port
    except ValueError:
        fine = secure = False
    if not fine or re.search(r"[\s\\]", text):
        raise wrong("is not an address without user, query and fragment", "write e.g. https://login.example.org")
    if not secure:
        raise wrong("is not https, so that others can read what is said there", "write https://...")
    return text


def _callback(text: str) -> str:
    if urlsplit(_secure_url(text)).path != CALLBACK_PATH:
        raise wrong(
            f"does not end with {CALLBACK_PATH}, where this gateway expects those who have logged in",
            f"write e.g. https://tidegate-admin.example.org{CALLBACK_PATH}",
        )
    return text


class AdminToken(Section):
    """A token beside the owner's: for a person or a program, with a role of its own."""

    role: Role = Field(
        description="What its bearer may do: `reader` look, `operator` also drain, kill and weigh, `owner` everything; "
        "`registrar` only say where replicas are and be told how many there should be (`tidegate register`)."
    )
    token: Secret = Field(
        description="The token, at least 16 bytes, as a reference {env: NAME} or {file: PATH}; no two may be the same."
    )
    pools: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="Of a registrar: the only pools that it may register replicas in and launch servers of, by their "
        "names under `backends`. Null: all that take registrations.",
        examples=[["chat", "chat-small"]],
    )


class Sessions(Section):
    """How long somebody who has logged in to the dashboard stays so."""

    lifetime_s: Number = Field(
        default=LONGEST_SESSION_S,
        ge=60,
        le=LONGEST_SESSION_S,
        description="Seconds after which one has to log in again, whatever one does. Eight hours, a working day, are "
        "the most.",
    )
    idle_s: Number = Field(
        default=3600,
        ge=30,
        le=LONGEST_SESSION_S,
        description="Seconds without a request after which a session ends; a page that is only left open makes none. "
        "An hour outlasts a meeting.",
    )
    max_per_name: Whole = Field(
        default=20,
        ge=1,
        le=1000,
        description="Sessions of one name at once; the one that was not used for longest makes room. Twenty are "
        "more browsers than anybody has.",
    )


class Oidc(Section):
    """Logging in at an identity provider: OpenID Connect, authorization code with PKCE."""

    issuer: Annotated[str, AfterValidator(_secure_url)] = Field(
        description="The provider's issuer, exactly as its tokens give it; its `/.well-known/openid-configuration` is "
        "read from there.",
        examples=["https://login.example.org/realms/main"],
    )
    client_id: Annotated[str, Field(pattern=r"^[!-~]{1,256}$")] = Field(
        description="The name under which the provider knows this gateway.", examples=["tidegate"]
    )
    client_secret: Secret | None = Field(
        default=None,
        description="The secret of that client, as a reference {env: NAME} or {file: PATH}. Null: a public client, "
        "which PKCE alone protects.",
    )
    redirect_url: Annotated[str, AfterValidator(_callback)] = Field(
        description=f"Where the provider sends people back to, as it is registered there: this listener's address as "
        f"browsers see it, with the path `{CALLBACK_PATH}`. Never taken from a request.",
        examples=["https://tidegate-admin.example.org/admin/session/oidc/callback"],
    )
    scopes: tuple[Annotated[str, Field(pattern=r"^[!#-\[\]-~]{1,100}$")], ...] = Field(
        default=("openid", "email"),
        max_length=20,
        description="What is asked of the provider; `openid` must be among them. Add the one that brings `role_claim`.",
    )
    name_claim: Annotated[str, Field(pattern=r"^[!-~]{1,200}$")] = Field(
        default="email",
        description="The claim by which the audit names people; where it is missing, `sub`. An e-mail address is what "
        "a reader of the audit knows.",
    )
    role_claim: Annotated[str, Field(pattern=r"^[!-~]{1,200}$")] = Field(
        default="groups",
        description="The claim of the ID token that says who may do what: a text or a list; with dots, a path into it "
        "(`realm_access.roles`).",
    )
    roles: Mapping[Annotated[str, Field(min_length=1, max_length=256)], PersonRole] = Field(
        max_length=200,
        description="Values of that claim and the role that each gives; the highest counts. Whoever has none of them "
        "gets in nowhere.",
        examples=[{"llm-oncall": "operator", "llm-admins": "owner"}],
    )
    allowed_domains: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]{1,253}$")], ...] = Field(
        default=(),
        max_length=100,
        description="Only people whose verified e-mail address is in one of these domains. Empty: any.",
        examples=[["example.org"]],
    )
