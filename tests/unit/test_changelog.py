"""debian/changelog, before a package is built and lintian reads it."""

from pathlib import Path

from taskd import __version__

LINES = (Path(__file__).parents[2] / "debian/changelog").read_text().splitlines()


def test_it_begins_with_this_version() -> None:
    assert LINES[0].startswith(f"taskd-service ({__version__}) ")


def test_no_line_is_longer_than_lintian_allows() -> None:
    assert [line for line in LINES if len(line) > 80] == []
