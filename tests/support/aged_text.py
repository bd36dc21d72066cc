# SPDX-License-Identifier: MIT
"""aged_text MIB — fill memory with text, say "ready", leave it alone until a line comes, then read all of it.

The text is words in the shares that natural languages have. Prints "right" or "wrong" at the end.
"""

from __future__ import annotations

import hashlib
import random
import sys

_PIECE = (4 << 20) - 37  # so that no two pages begin alike


def _piece(seed: int) -> bytes:
    chance = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = range(len(letters), 0, -1)
    words = ["".join(chance.choices(letters, weights, k=chance.randint(1, 10))) for _ in range(4000)]
    shares = [1 / rank for rank in range(1, len(words) + 1)]
    text = " ".join(chance.choices(words, shares, k=_PIECE // 4))
    return text.encode()[:_PIECE]


def main(mib: int) -> None:
    """Entry point."""
    piece = _piece(1)
    memory = bytearray(mib << 20)
    for start in range(0, len(memory), len(piece)):
        end = min(start + len(piece), len(memory))
        memory[start:end] = piece[: end - start]
    before = hashlib.blake2b(memory).digest()
    print("ready", flush=True)
    sys.stdin.readline()
    print("right" if hashlib.blake2b(memory).digest() == before else "wrong", flush=True)


main(int(sys.argv[1]))
