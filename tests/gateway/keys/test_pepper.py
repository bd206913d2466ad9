"""The pepper: configured, or a file that is made once and never replaced."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.config.limits import MIN_PEPPER_BYTES
from gateway.keys.pepper import PepperError, load_pepper


def test_configured_one_is_used_as_it_is(tmp_path: Path) -> None:
    assert load_pepper(SecretStr("a" * 32), f"sqlite:///{tmp_path}/a.db") == b"a" * 32
    assert load_pepper(SecretStr("a" * 32), "postgresql://db/tidegate") == b"a" * 32
    assert not list(tmp_path.iterdir())


def test_short_one_is_refused_and_not_repeated() -> None:
    with pytest.raises(PepperError) as caught:
        load_pepper(SecretStr("hunter2"), "sqlite:///a.db")
    assert "hunter2" not in str(caught.value)


def test_the_shortest_is_what_the_check_of_the_configuration_says() -> None:
    load_pepper(SecretStr("p" * MIN_PEPPER_BYTES), "sqlite:///a.db")
    with pytest.raises(PepperError, match=f"fewer than {MIN_PEPPER_BYTES} bytes"):
        load_pepper(SecretStr("p" * (MIN_PEPPER_BYTES - 1)), "sqlite:///a.db")


def test_none_is_made_beside_a_database_that_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"no database at all, " * 100)
    with pytest.raises(PepperError, match="cannot be used"):
        load_pepper(None, f"sqlite:///{tmp_path}/a.db")
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]


def test_file_is_made_once_for_the_owner_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(load_pepper(None, url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    file = tmp_path / "a.db.pepper"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a.db.pepper"]
    assert load_pepper(None, url) == found[0] == file.read_bytes().strip()


def test_file_that_others_can_read_or_that_was_spoilt_is_never_replaced(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    load_pepper(None, url)
    file = tmp_path / "a.db.pepper"
    before = file.read_bytes()
    file.chmod(0o644)
    with pytest.raises(PepperError, match="nobody else"):
        load_pepper(None, url)
    assert file.read_bytes() == before
    file.chmod(0o600)
    file.write_text("")
    with pytest.raises(PepperError, match="no pepper"):
        load_pepper(None, url)
    assert file.read_bytes() == b""


def test_postgresql_needs_a_configured_one() -> None:
    with pytest.raises(PepperError, match=r"keys\.pepper"):
        load_pepper(None, "postgresql://db/tidegate")


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(PepperError, match=f"database: there is no directory {tmp_path}/none: make it"):
        load_pepper(None, f"sqlite:///{tmp_path}/none/a.db")
