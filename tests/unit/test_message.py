"""Messages: what they ask for, and every way in which one cannot be a job."""

import json

import pytest

from taskd.errors import Rejected
from taskd.work import message
from tests.support.messages import delivery, queue, task

TASKS = {
    "build": task("build", "/bin/build --branch {branch=main} {repo}"),
    "thumbnail": task("thumbnail"),
    "secret": task("secret"),
}


def read(body, queue_options=None, **properties):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return message.read(delivery(body, **properties), queue(**(queue_options or {})), TASKS)


def reason(body, queue_options=None, **properties):
    with pytest.raises(Rejected) as rejected:
        read(body, queue_options, **properties)
    return str(rejected.value)


def test_an_envelope_names_id_task_and_params():
    order = read({"id": "7f3a", "task": "build", "params": {"repo": "r", "branch": "b"}})
    assert (order.id, order.named, order.task.name) == ("7f3a", True, "build")
    assert order.argv == ("/bin/build", "--branch", "b", "r")


def test_worker_is_taken_for_task_as_older_producers_write_it():
    assert read({"worker": "thumbnail"}).task.name == "thumbnail"


def test_an_object_without_params_is_itself_the_params():
    order = read({"id": "1", "task": "build", "repo": "r"})
    assert order.argv == ("/bin/build", "--branch", "main", "r")


def test_properties_win_over_the_body():
    order = read({"id": "a", "task": "build"}, id="b", task="thumbnail")
    assert (order.id, order.task.name) == ("b", "thumbnail")


def test_a_message_without_an_id_gets_one_of_its_own():
    first, second = read({"task": "thumbnail"}), read({"task": "thumbnail"})
    assert not first.named
    assert first.id != second.id


def test_the_uuid_of_a_laravel_payload_is_its_id():
    body = {"uuid": "0d5c", "displayName": "App\\Job", "id": "random", "data": {}}
    assert read(body, task="thumbnail").id == "0d5c"


def test_an_opaque_body_runs_the_default_task_of_its_queue():
    assert read(b"\x00\xff", {"task": "thumbnail"}).task.name == "thumbnail"


def test_a_binary_body_on_a_queue_without_a_task_is_rejected():
    assert "queue q has no default task" in reason(b"\x00\xff\x17")


def test_a_number_is_taken_as_an_id():
    assert read({"id": 42, "task": "thumbnail"}).id == "42"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"task": "build"', "bad JSON: "),
        (b'{"task": "\xff"}', "bad JSON: the body is not UTF-8"),
        (b'{"a":' * 100_000, "bad JSON: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "bad JSON: "),
        ({"task": "nuild"}, "unknown task 'nuild'"),
        ({"task": "secret"}, "queue q does not allow task 'secret', only build, thumbnail"),
        ({"task": ["build"]}, "its task must be a string, not list"),
        ({"task": "build", "params": []}, "params must be a JSON object, not list"),
        ({"task": "build", "params": {}}, "repo"),
        ({"task": "build", "repo": "-rf"}, "repo"),
        ({"task": "build", "repo": "a\0b"}, "NUL"),
        ({"task": "build", "repo": "a\ud800b"}, "not valid Unicode"),
        ({"task": "build", "repo": {"a": 1}}, "repo"),
        ({"task": "build", "repo": "x" * 131_073}, "repo"),
        ({"task": "thumb\0nail"}, "its task contains NUL"),
        ({"task": "thumb\ud800"}, "its task contains a lone surrogate"),
        ({"id": "a\0b", "task": "thumbnail"}, "its id contains NUL"),
        ({"id": "\udfff", "task": "thumbnail"}, "its id contains a lone surrogate"),
        ({"id": "x" * 256, "task": "thumbnail"}, "its id must be 1 to 255 bytes"),
        ({"id": "a\nb", "task": "thumbnail"}, "its id must be 1 to 255 bytes of printable text"),
        ({"id": "", "task": "thumbnail"}, "its id must be 1 to 255 bytes"),
        ({"id": True, "task": "thumbnail"}, "its id must be a string, not bool"),
    ],
)
def test_a_message_that_cannot_be_a_job_is_rejected_with_the_reason(body, part):
    if isinstance(body, dict):
        body = json.dumps(body).encode("utf-8", "surrogatepass")
    assert part in reason(body)
    id, _ = message.identify(delivery(body))
    message.check_id(id)


def test_a_body_over_body_max_is_rejected():
    assert "body_max of queue q is 10" in reason(b"x" * 11, {"body_max": 10, "task": "build"})


def test_a_broken_body_does_not_take_away_the_id_of_the_properties():
    assert message.identify(delivery(b"{", id="7f3a")) == ("7f3a", True)


def test_a_rejected_message_keeps_its_own_id_and_task_for_the_record():
    broken = delivery(b'{"id": "7f3a", "task": "nuild"}')
    assert message.identify(broken) == ("7f3a", True)
    assert message.task_named(broken) == "nuild"
