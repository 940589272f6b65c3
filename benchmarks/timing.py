"""What the benchmarks share: a clock that waits for the device."""

import time

import torch


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
