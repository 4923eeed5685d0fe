"""A daemon as of old: two forks, a session of its own, deaf, no parent, no pipes, no traces."""

import os
import signal
import sys

reading, writing = os.pipe()
if os.fork():
    os.close(writing)
    os.wait()
    os.read(reading, 1)
    sys.exit(0)
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.chdir("/")
for fd in range(3):
    os.dup2(os.open("/dev/null", os.O_RDWR), fd)
# With another name and another environment, it tells that it is there, and stays.
os.set_inheritable(writing, True)
script = 'echo >&"$0"; exec 0<&- 1<&- 2<&-; while :; do sleep 600; done'
os.execve("/bin/sh", ["[kworker/0:1]", "-c", script, str(writing)], {"PATH": "/usr/bin:/bin"})
