"""Hosts: network namespaces on a bridge of the test's own, each with an address and a cable.

It needs root. Whatever was made is gone after `close`, also what a killed run left behind under
the same names.
"""

import os
import subprocess
from collections.abc import Sequence

from tests.support.needs import cannot_run, needs

PREFIX = "tkd"
HOME = 0  # the number of the machine itself on the network


def ip(*words: str, on: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*on, "ip", *words], capture_output=True, text=True, timeout=30)


def check(*words: str, on: Sequence[str] = ()) -> None:
    done = ip(*words, on=on)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Network:
    """`with Network(3) as network:`; host 1 is in the namespace `network.host(1)`."""

    def __init__(self, hosts: int) -> None:
        needs("ip")
        needs("nsenter")
        # Interfaces' names have at most 15 characters, and are the machine's, not the test's.
        self._mark = f"{PREFIX}{os.getpid() % 100_000}"
        self._third = os.getpid() % 250
        self._hosts = range(1, hosts + 1)

    def __enter__(self) -> "Network":
        if ip("netns", "add", self.host(1)).returncode != 0:
            cannot_run("network namespaces cannot be made here: that takes root")
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> None:
        check("link", "add", self._mark, "type", "bridge")
        check("addr", "add", f"{self.address(HOME)}/24", "dev", self._mark)
        check("link", "set", self._mark, "up")
        for number in self._hosts:
            host, cable = self.host(number), self._cable(number)
            if number != 1:
                check("netns", "add", host)
            ours = ("type", "veth", "peer", "name", "eth0", "netns", host)
            check("link", "add", cable, *ours)
            check("link", "set", cable, "master", self._mark, "up")
            own = self.inside(number)
            check("addr", "add", f"{self.address(number)}/24", "dev", "eth0", on=own)
            check("link", "set", "eth0", "up", on=own)
            check("link", "set", "lo", "up", on=own)

    def close(self) -> None:
        for number in self._hosts:
            ip("netns", "del", self.host(number))
            ip("link", "del", self._cable(number))
        ip("link", "del", self._mark)

    def host(self, number: int) -> str:
        return f"{self._mark}h{number}"

    def _cable(self, number: int) -> str:
        return f"{self._mark}c{number}"

    def address(self, number: int) -> str:
        """In a network for benchmarks, which nobody routes (RFC 2544)."""
        return f"198.18.{self._third}.{number + 1}"

    def cut(self, number: int) -> None:
        """Pull the cable: packets vanish, and nobody is told."""
        check("link", "set", self._cable(number), "down")

    def mend(self, number: int) -> None:
        check("link", "set", self._cable(number), "up")

    def inside(self, number: int) -> list[str]:
        """Words that run a command on that host."""
        # Not `ip netns exec`: that remounts what in a chroot is no mount.
        return ["nsenter", f"--net=/run/netns/{self.host(number)}"]
