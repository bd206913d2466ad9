"""A certificate authority for one test run, made with the `openssl` command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files: a server's, for `localhost` and 127.0.0.1, and the authority that signed it."""

    ca: str
    certificate: str
    key: str

    def options(self, port: int) -> tuple[tuple[str, ...], ...]:
        """For a `RedisServer` that also speaks TLS, at this port."""
        return (
            ("tls-port", str(port)),
            ("tls-cert-file", self.certificate),
            ("tls-key-file", self.key),
            ("tls-ca-cert-file", self.ca),
            ("tls-auth-clients", "no"),
        )


def make_certificates(folder: Path) -> Certificates:
    """Skips the test where there is no `openssl`."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    ca, ca_key, key = folder / "ca.pem", folder / "ca.key", folder / "server.key"
    request, certificate, extra = folder / "server.csr", folder / "server.pem", folder / "names"
    extra.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for command in (
        ("req", "-x509", *new_key, "-days", "2", "-subj", "/CN=Test CA", "-keyout", str(ca_key), "-out", str(ca)),
        ("req", *new_key, "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(request)),
        (
            *("x509", "-req", "-days", "2", "-in", str(request), "-CA", str(ca), "-CAkey", str(ca_key)),
            *("-CAcreateserial", "-extfile", str(extra), "-out", str(certificate)),
        ),
    ):
        subprocess.run(("openssl", *command), check=True, capture_output=True)
    return Certificates(str(ca), str(certificate), str(key))
