"""Writes 3 MB of every byte there is but the one that ends a line."""

import os
import sys

TEXT = bytes(byte for byte in range(256) if byte != 10) * 16

for _ in range(3 * 2**20 // len(TEXT)):
    sys.stdout.buffer.write(TEXT)
sys.stdout.flush()
sys.stderr.buffer.write(os.urandom(1000).replace(b"\n", b""))
