"""What people do to a broker: each is said where one looks, tried again calmly, and got over.

A job runs through all of it, and is adopted afterwards.
"""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.scene import CONFIG, scene
from tests.support.certificates import authority, certificate
from tests.support.needs import needs_rabbitmq
from tests.support.proxy import Proxy
from tests.support.rabbitmq import running_server
from tests.support.waiting import wait_until

# Pauses between tries are at least 1/4, 1/2, 1 and 2 seconds, and longer after that.
WATCHED = 5.0
TRIES_MAX = 6
CPU_MAX = 0.2  # of a processor; a busy loop takes a whole one


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    authority(directory, "ca")
    certificate(directory, "server")
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory, keys):
    needs_rabbitmq()
    with running_server(directory=tmp_path_factory.mktemp("rabbitmq"), tls=keys) as server:
        yield server


@pytest.fixture
def vhost(server):
    server.node.add_vhost("place")
    server.ctl("add_user", "worker", "secret")
    permit(server)
    yield "place"
    server.ctl("delete_user", "worker")
    server.ctl("delete_vhost", "place")


def permit(server, *, read=".*"):
    server.ctl("set_permissions", "--vhost", "place", "worker", ".*", ".*", read)


def hang_up(it, server):
    it.hang_up()
    server.ctl("close_all_connections", "--vhost", "place", "over")


@contextmanager
def at_work(tmp_path, server, vhost, *, port=0, scheme="amqp", queue=""):
    """A daemon that a proxy leads to the broker as `worker`, and that runs a job."""
    with Proxy(port or server.node.port) as proxy:
        through = f"{scheme}://worker:secret@127.0.0.1:{proxy.port}/{vhost}"
        config = CONFIG.replace("@url@", through)
        with scene(tmp_path, server.url(vhost), config, queue=queue) as it:
            it.publish({"task": "hold"}, message_id="held")
            it.begun(1)
            yield it, proxy
            it.until_up()
            if it.taskd.job("held")["state"] == "running":
                it.go()
                it.taskd.until("held", "succeeded")
            assert it.counted("begin")["held"] == 1
            assert it.taskd.stop() == 0


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def assert_said_and_calm(it, proxy, text, *, state="down", times=1):
    """STATUS, `taskctl queues` and the journal say it, the journal once; and nothing is busy."""
    it.taskd.until_told(text)

    def said():
        (queue,) = it.taskd.ask("QUEUES")
        listing = it.taskd.ctl("queues").out
        # As wide as a terminal lets it be; between two tries, and not while one is made.
        listed = state in listing and text.split()[0] in listing
        return listed and text in queue["reason"] and queue["state"] == state

    wait_until(said)
    tries, cpu, begun = proxy.accepted, cpu_seconds(it.taskd.pid), time.monotonic()
    wait_until(lambda: time.monotonic() - begun > WATCHED)
    assert proxy.accepted - tries <= TRIES_MAX
    assert cpu_seconds(it.taskd.pid) - cpu < CPU_MAX * WATCHED
    assert it.taskd.log.count(text) == times, it.taskd.log


def test_a_password_that_is_changed(tmp_path, server, vhost):
    with at_work(tmp_path, server, vhost) as (it, proxy):
        server.ctl("change_password", "worker", "another")
        hang_up(it, server)
        assert_said_and_calm(it, proxy, "403 ACCESS_REFUSED")
        assert "secret" not in it.taskd.log
        server.ctl("change_password", "worker", "secret")
        it.until_said("adopted")


def test_permissions_that_are_withdrawn(tmp_path, server, vhost):
    with at_work(tmp_path, server, vhost) as (it, proxy):
        server.ctl("clear_permissions", "--vhost", vhost, "worker")
        hang_up(it, server)
        assert_said_and_calm(it, proxy, "530 NOT_ALLOWED")
        permit(server)
        it.until_said("adopted")


def test_a_permission_to_read_that_is_withdrawn(tmp_path, server, vhost):
    with at_work(tmp_path, server, vhost) as (it, proxy):
        permit(server, read="^$")
        hang_up(it, server)
        assert_said_and_calm(it, proxy, "403 ACCESS_REFUSED")
        permit(server)
        it.until_said("adopted")


def test_a_vhost_that_is_deleted_and_made_anew(tmp_path, server, vhost):
    with at_work(tmp_path, server, vhost) as (it, proxy):
        it.hang_up()
        server.ctl("delete_vhost", vhost)
        assert_said_and_calm(it, proxy, "530 NOT_ALLOWED - vhost place not found")
        server.node.add_vhost(vhost)
        permit(server)
        it.until_up()
        it.publish({"task": "act"}, message_id="next")
        it.taskd.until("next", "succeeded")


def test_a_queue_that_others_delete_and_make_again(tmp_path, server, vhost):
    with at_work(tmp_path, server, vhost) as (it, proxy):
        it.go()
        it.taskd.until("held", "succeeded")
        text = it.taskd.config.read_text()
        it.taskd.config.write_text(text.replace("task = hold", "declare = no\ntask = hold", 1))
        assert it.taskd.ctl("reload").code == 0
        it.until_up()
        it.channel.queue_delete(it.name)
        assert_said_and_calm(it, proxy, "the queue does not exist")
        it.channel.queue_declare(it.name, durable=True, arguments={"x-queue-type": "quorum"})
        it.until_up()
        it.publish({"task": "act"}, message_id="next")
        it.taskd.until("next", "succeeded")


def test_a_memory_alarm(tmp_path, server, vhost):
    with at_work(tmp_path, server, vhost) as (it, proxy):
        assert it.taskd.ctl("pause", "work").code == 0
        for number in range(3):
            it.publish({"task": "act", "params": {"kind": "fail"}}, message_id=f"fails-{number}")
        server.ctl("set_vm_memory_high_watermark", "0.00001")
        try:
            assert it.taskd.ctl("resume", "work").code == 0
            text = "RabbitMQ takes no messages for now"
            assert_said_and_calm(it, proxy, text, state="up")
            # Neither retried nor dead yet: what cannot be published is not acknowledged.
            assert it.taskd.ask("QUEUES")[0]["unacked"] >= 1
        finally:
            server.ctl("set_vm_memory_high_watermark", "0.4")
        for number in range(3):
            it.taskd.until(f"fails-{number}", "failed")
        wait_until(lambda: it.depth(".dead") == 3)


def test_a_certificate_that_expires(tmp_path, server, keys, vhost):
    options = f"ca_file = {keys}/ca.pem"
    port = server.node.tls_port
    with at_work(tmp_path, server, vhost, port=port, scheme="amqps", queue=options) as (it, proxy):
        replace(server, keys, days=0)
        hang_up(it, server)
        assert_said_and_calm(it, proxy, "TLS: certificate has expired")
        replace(server, keys, days=2)
        it.until_said("adopted")


def replace(server, keys, *, days):
    """Another certificate for the server, from its next connection on."""
    certificate(keys, "server", days=days)
    server.node.eval("ssl:clear_pem_cache().")
