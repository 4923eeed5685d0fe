"""Who a client is, as the record of what it did names it."""

import os
import socket
from pathlib import Path

import pytest

from taskd.control.peer import Peer, peer_of

PASSWD = "root:x:0:0::/root:/bin/sh\n\nodd\nalice:x:1000:1000:Alice,,,:/home/a:/bin/sh\n"


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        (Peer(0), "root"),
        (Peer(1000), "alice"),
        (Peer(61234), "uid 61234"),
        (Peer(None, "192.0.2.7"), "192.0.2.7 over TCP"),
    ],
)
def test_a_client_is_named_by_its_user_or_by_its_address(
    tmp_path: Path, peer: Peer, name: str
) -> None:
    (tmp_path / "passwd").write_text(PASSWD)
    assert peer.name(tmp_path / "passwd") == name


def test_the_kernel_says_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours, "")
    assert (peer, str(peer), peer.local) == (Peer(os.getuid()), "the unix socket", True)
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()):
        accepted, address = server.accept()
        with accepted:
            peer = peer_of(accepted, address)
    assert (peer, str(peer)) == (Peer(None, "127.0.0.1"), "TCP from 127.0.0.1")
    assert not peer.local
