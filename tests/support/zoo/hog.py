"""Takes memory, a piece at a time, and uses all of it."""

PIECE = 4 << 20

pieces = []
for _ in range(24):
    pieces.append(bytearray(PIECE))
    pieces[-1][::4096] = b"x" * (PIECE // 4096)
