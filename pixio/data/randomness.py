"""Random numbers that are pure functions of a key, so that no state of a generator has to be saved."""

import hashlib

import numpy as np


def digest(*key: int | str) -> bytes:
    """16 bytes that depend on the key and nothing else."""
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def uniform(*key: int | str) -> float:
    """A number uniform in [0, 1) that is a pure function of the key."""
    return (int.from_bytes(digest(*key)[:8], "little") >> 11) / (1 << 53)


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that is a pure function of the key."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(*key), "little")))
