"""What a configuration is warned of and not refused for."""

import pytest

from taskd.config import reader

CONFIG = """
[queue:films]
url = {url}
{more}

[task:cut]
command = /bin/true
timeout = {timeout}
stop_timeout = 10s

[task:probe]
command = /bin/true
"""


def warnings(tmp_path, timeout, *, url="amqp://guest@localhost/", more=""):
    path = tmp_path / "taskd.conf"
    path.write_text(CONFIG.format(url=url, timeout=timeout, more=more))
    return list(reader.read(path, {}).warnings())


def test_a_task_that_may_outlive_its_delivery_is_warned_of(tmp_path):
    assert warnings(tmp_path, "2h") == [
        "task cut: may run for 2h, and the broker of queue films takes a message back after 30min "
        "(consumer_timeout); the job then goes on and finds its message again, unless the queue "
        "acknowledges early"
    ]


def test_the_time_to_stop_counts(tmp_path):
    assert warnings(tmp_path, "29min 49s") == []
    assert len(warnings(tmp_path, "29min 51s")) == 1


@pytest.mark.parametrize(
    ("timeout", "options"),
    [
        ("2h", {"more": "consumer_timeout = 3h"}),
        ("2h", {"more": "consumer_timeout = infinity"}),
        ("2h", {"more": "acknowledge = early"}),
        ("2h", {"url": "embedded:"}),
        ("2h", {"more": "tasks = probe\n[queue:local]\nurl = embedded:\ntask = cut"}),
        ("infinity", {}),
    ],
)
def test_there_is_no_warning_where_nothing_can_be_said(tmp_path, timeout, options):
    assert warnings(tmp_path, timeout, **options) == []
