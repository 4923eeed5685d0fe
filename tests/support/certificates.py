"""Certificates for tests, made by openssl: authorities, and what they sign for 127.0.0.1."""

import subprocess
from pathlib import Path

from tests.support.needs import needs


def authority(directory: Path, name: str) -> None:
    """NAME.pem and NAME.key, signed by itself."""
    files = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    _openssl(directory, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *files)


def certificate(directory: Path, name: str, *, days: int = 2) -> None:
    """NAME.pem and NAME.key, signed by `ca`; of no days: expired."""
    request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    _openssl(directory, "req", "-newkey", "rsa:2048", "-nodes", *request)
    (directory / "names").write_text("subjectAltName = IP:127.0.0.1\n")
    signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
    files = ("-in", f"{name}.csr", "-out", f"{name}.pem")
    _openssl(directory, "x509", "-req", "-days", str(days), *signer, *files)


def _openssl(directory: Path, *words: str) -> None:
    done = subprocess.run(
        [needs("openssl"), *words], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
