"""Where the database is, read from the setting `database`. Needs nothing installed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from gateway.database.errors import DatabaseInvalid

_SECRET_OPTIONS = {"password", "sslpassword"}


@dataclass(frozen=True)
class Address:
    """`path` of a SQLite file, or None for PostgreSQL."""

    url: str
    path: Path | None

    @property
    def shown(self) -> str:
        """For messages: the URL, which holds no password."""
        return self.url

    @property
    def place(self) -> str:
        """For operators: where a SQLite file really is, whatever the working directory; else the URL."""
        return self.url if self.path is None else str(self.path.absolute())


def parse(url: str) -> Address:
    """`sqlite:///file` or `postgresql://user@host:port/name`. Raises `DatabaseInvalid`, naming nothing secret."""
    if url.startswith("sqlite:///"):
        path = url.removeprefix("sqlite:///")
        if not path or path.startswith((":", "file:")) or "?" in path or "\0" in path:
            raise DatabaseInvalid("sqlite", "the URL must name a file and nothing else, e.g. sqlite:///tidegate.db")
        return Address(url, Path(path))
    if re.match(r"postgresql://.", url):
        try:
            parts = urlsplit(url)
            secret = parts.password is not None
            host, port, name = parts.hostname, parts.port, parts.path.strip("/")
        except ValueError:
            raise DatabaseInvalid("postgresql", "the URL cannot be read") from None
        shown = f"postgresql://{host or ''}{f':{port}' if port else ''}/{name}"
        if secret or any(option in _SECRET_OPTIONS for option, _ in parse_qsl(parts.query, keep_blank_values=True)):
            raise DatabaseInvalid(shown, "a password does not belong into its URL: use database_password or PGPASSWORD")
        if not name:
            raise DatabaseInvalid(
                shown, "the URL names no database, write e.g. postgresql://tidegate@db.internal/tidegate"
            )
        return Address(url, None)
    raise DatabaseInvalid(url.partition(":")[0][:20], "write sqlite:///FILE or postgresql://USER@HOST/NAME")
