"""A test that cannot run is skipped for a developer and fails a build."""

import pytest

from tests.support.needs import needs


def test_a_tool_that_is_there_is_given_by_its_path():
    assert needs("sh").endswith("/sh")


def test_a_missing_tool_skips_the_test(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-tool is not installed"):
        needs("no-such-tool")


def test_a_missing_tool_fails_the_test_where_ci_is_set(monkeypatch):
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is not installed"):
        needs("no-such-tool")
