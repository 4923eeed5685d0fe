"""The bare loop that taskd is measured against: pika, signalfd, posix_spawn, and no more.

It acknowledges a message when its child has exited, and records nothing. Prints the seconds
from the first delivery to the last acknowledgement.

    python -m bench.bare URL QUEUE COUNT PREFETCH
"""

import os
import signal
import sys
import time

import pika

from taskd.kernel.signals import SignalFd

TRUE = "/bin/true"


class Bare:
    def __init__(self, url: str, queue: str, count: int, prefetch: int) -> None:
        self.queue = queue
        self.left = count
        self.prefetch = prefetch
        self.started = 0.0
        self.tags: dict[int, int] = {}
        self.signals = SignalFd([signal.SIGCHLD])
        self.connection = pika.SelectConnection(
            pika.URLParameters(url), on_open_callback=self.on_open
        )
        self.loop = self.connection.ioloop

    def on_open(self, connection: pika.SelectConnection) -> None:
        self.loop.add_handler(self.signals.fd, self.on_signal, self.loop.READ)
        connection.channel(on_open_callback=self.on_channel)

    def on_channel(self, channel: "pika.channel.Channel") -> None:
        self.channel = channel
        channel.basic_qos(prefetch_count=self.prefetch)
        channel.basic_consume(self.queue, self.on_message)

    def on_message(self, channel, method, properties, body) -> None:  # type: ignore[no-untyped-def]
        self.started = self.started or time.monotonic()
        pid = os.posix_spawn(TRUE, [TRUE], {}, setsigmask=[], setsid=True)
        self.tags[pid] = method.delivery_tag

    def on_signal(self, fd: int, events: int) -> None:
        self.signals.read()
        while self.tags:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self.channel.basic_ack(self.tags.pop(pid))
            self.left -= 1
            if not self.left:
                print(time.monotonic() - self.started, flush=True)
                self.connection.add_on_close_callback(lambda *_: self.loop.stop())
                self.connection.close()


def main() -> None:
    url, queue, count, prefetch = sys.argv[1:]
    Bare(url, queue, int(count), int(prefetch)).loop.start()


if __name__ == "__main__":
    main()
