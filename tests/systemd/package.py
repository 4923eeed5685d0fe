"""The .deb, made once and kept by what it is made from."""

import hashlib
import shutil
from pathlib import Path

from tests.support.debian import ROOT, made, run

# The tests that it runs while it is built need no more than these.
MADE_FROM = """
    LICENSE README.md debian packaging pyproject.toml src units
    tests/__init__.py tests/conftest.py tests/support tests/unit
"""
BUILD = "dpkg-buildpackage -b -us -uc"


def package() -> Path:
    """taskd-service_VERSION_all.deb, built from this source tree as anybody builds it."""
    directory = made(f"deb-{_digest_of_sources()}", _build)
    (deb,) = directory.glob("*.deb")
    return deb


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for name in MADE_FROM.split():
        top = ROOT / name
        for path in sorted([top, *top.rglob("*")]):
            if "__pycache__" in path.parts or path.suffix == ".egg-info" or path.is_dir():
                continue
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_mode}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _build(target: Path) -> None:
    source = target / "source"
    source.mkdir()
    for name in MADE_FROM.split():
        top = ROOT / name
        (source / name).parent.mkdir(exist_ok=True)
        if top.is_dir():
            passed_over = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(top, source / name, symlinks=True, ignore=passed_over)
        else:
            shutil.copy2(top, source / name)
    run(*BUILD.split(), cwd=source)
    shutil.rmtree(source)
