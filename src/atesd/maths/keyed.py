"""Keyed randomness: every draw is a function of (run seed, stream, key), never of what was drawn before.

So neither a resume, nor the micro-batch, nor the world size, nor an extra evaluation changes a sample, and two
components with their own streams never share a generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def generator(seed: int, stream: str, *key: int | str) -> np.random.Generator:
    """A counter-based generator (Philox): what it draws is a function of (seed, stream, key) alone."""
    text = repr((seed, stream, *key)).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniforms(count: int, seed: int, stream: str, *key: int | str) -> NDArray[np.float64]:
    """`count` draws from U[0, 1): shape [count]. The first n of a longer draw equal a draw of n."""
    return generator(seed, stream, *key).random(count)
