from __future__ import annotations

import pytest

from backends.origin import Origin


@pytest.mark.parametrize(
    ("url", "origin", "host_header", "address"),
    [
        ("http://127.0.0.1:30000", Origin("http", "127.0.0.1", 30000), b"127.0.0.1:30000", "127.0.0.1:30000"),
        (
            "http://Engine.Internal/",
            Origin("http", "engine.internal", 80),
            b"engine.internal",
            "engine.internal:80",
        ),
        ("http://h:80", Origin("http", "h", 80), b"h", "h:80"),
        ("https://h.test.:8", Origin("https", "h.test.", 8), b"h.test:8", "h.test.:8"),
        ("https://h.test.", Origin("https", "h.test.", 443), b"h.test", "h.test.:443"),
        ("https://h", Origin("https", "h", 443), b"h", "h:443"),
        ("https://h:443", Origin("https", "h", 443), b"h", "h:443"),
        ("https://h:80", Origin("https", "h", 80), b"h:80", "h:80"),
        ("http://[::1]:30000", Origin("http", "::1", 30000), b"[::1]:30000", "[::1]:30000"),
        ("http://[::1]", Origin("http", "::1", 80), b"[::1]", "[::1]:80"),
        (
            "http+unix://%2Frun%2FEngine.sock",
            Origin("http+unix", "localhost", 0, "/run/Engine.sock"),
            b"localhost",
            "unix:/run/Engine.sock",
        ),
    ],
)
def test_url_is_read(url: str, origin: Origin, host_header: bytes, address: str) -> None:
    parsed = Origin.parse(url)
    assert parsed == origin
    assert hash(parsed) == hash(origin)
    assert parsed.host_header == host_header
    assert parsed.address == address
    assert parsed.tls == url.startswith("https")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h",
        "h:80",
        "http://",
        "http://:80",
        "http://user:secret@h",
        "http://h/v1",
        "http://h?x",
        "http://h#x",
        "http://h:99999",
        "http://h:0",
        "http://h:x",
        "http://h\x7f",
        "http://a b",
        "http://bücher.example",
        "http+unix://run.sock",
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Origin.parse(url)
    assert "secret" not in str(caught.value)


def test_origin_reads_like_a_url() -> None:
    assert str(Origin.parse("http://[::1]:8080")) == "http://[::1]:8080"
    assert str(Origin.parse("https://h")) == "https://h"
    assert str(Origin.parse("http+unix://%2Frun%2Fe.sock")) == "http+unix:/run/e.sock"
