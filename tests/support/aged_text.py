# SPDX-License-Identifier: MIT
"""aged_text MIB [NOISE_MIB] — fill memory with text, then noise, say "ready", leave it alone until a line comes.

Then it reads all of it.

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


def main(mib: int, noise_mib: int = 0) -> None:
    """Entry point."""
    piece = _piece(1)
    memory = bytearray(mib + noise_mib << 20)
    for start in range(0, mib << 20, len(piece)):
        end = min(start + len(piece), mib << 20)
        memory[start:end] = piece[: end - start]
    for start in range(mib << 20, len(memory), 1 << 20):
        memory[start : start + (1 << 20)] = random.Random(start).randbytes(1 << 20)
    before = hashlib.blake2b(memory).digest()
    print("ready", flush=True)
    sys.stdin.readline()
    print("right" if hashlib.blake2b(memory).digest() == before else "wrong", flush=True)


main(*map(int, sys.argv[1:]))
