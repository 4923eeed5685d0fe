"""Gives descriptors away by the hundred, and leaves a deaf child behind that holds its pipes."""

import os
import signal
import socket
import struct
import sys

fds = [os.open("/dev/null", os.O_RDWR) for _ in range(250)]
for fd in fds:
    os.set_inheritable(fd, True)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
for _ in range(8):
    sender.sendmsg([b"FDSTORE=1\nSTATUS=yours"], rights, 0, os.environ["NOTIFY_SOCKET"])
if os.fork():
    sys.exit(0)
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pause()
