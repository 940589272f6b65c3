"""What a consumer has read, dropped and failed to read, and when that ends the run."""

import logging
import time
from collections import Counter, deque
from typing import Any

from pixio.data.sampling import Group, Sampler, ShardSlice

logger = logging.getLogger(__name__)

MIN_READ = 200  # images before the share of errors means anything
MAX_CONSECUTIVE = 50  # failures in a row: the storage is gone, not an image
MAX_EMPTY = 256  # shard slices without one sample before a set counts as empty
LOG_SECONDS = 60.0


class DataError(RuntimeError):
    """The training data as a whole cannot be used; the run has to stop."""


class ReadStatistics:
    """Counts and error messages of one consumer since it started, and the limits that stop the run.

    Counts: `seen` images = `kept` + `bad_image` + those dropped by `no_statistics`, `damaged`, `histogram`,
    `resolution` or `sampled_out`; beside them whole shards, as `bad_shard`, `incomplete_shard`
    (what can be read of it is used) and `shard_without_statistics`.
    """

    def __init__(self, error_budget: float) -> None:
        self.error_budget = error_budget
        self.counts: Counter[str] = Counter()
        self._messages: list[str] = []
        self._reported: Counter[str] = Counter()
        self._latest: deque[str] = deque(maxlen=5)
        self._consecutive = 0
        self._logged, self._unlogged = -LOG_SECONDS, 0
        self._start_search()

    def _start_search(self) -> None:
        self._empty: set[ShardSlice] = set()
        self._empty_count = 0
        self._sampled_out = self.counts["sampled_out"]

    def keep(self) -> None:
        """Count a sample."""
        self.counts["kept"] += 1
        self._consecutive = 0
        self._start_search()

    def fail(self, kind: str, where: str, error: Exception | str) -> None:
        """Count what cannot be read, log it at a bounded rate, and stop when it is too much.

        Raises:
            DataError: the error budget is exceeded, or nothing can be read any more.
        """
        message = f"{where}: {error}"
        self.counts[kind] += 1
        self._consecutive += 1
        self._latest.append(message)
        self._messages.append(message)
        if time.monotonic() - self._logged >= LOG_SECONDS:
            more = f" (and {self._unlogged} more since the last line)" if self._unlogged else ""
            logger.warning("skipped %s%s", message, more)
            self._logged, self._unlogged = time.monotonic(), 0
        else:
            self._unlogged += 1

        errors = sum(self.counts[name] for name in ("bad_image", "bad_shard", "incomplete_shard"))
        read = errors + self.counts["kept"]
        if self._consecutive >= MAX_CONSECUTIVE:
            self._stop(f"{self._consecutive} failures in a row")
        if read >= MIN_READ and errors > self.error_budget * read:
            self._stop(f"{errors} of {read} images failed, above the error budget {self.error_budget}")

    def _stop(self, why: str) -> None:
        latest = "\n  ".join(self._latest)
        raise DataError(f"the training data cannot be read: {why}; the last ones:\n  {latest}")

    def end_empty(self, group: Group, sampler: Sampler, had_entries: bool) -> None:
        """Note a group that was read whole without one sample; stop when the set has none.

        A consumer can be unlucky with what it is assigned. It stops when it has been through every slice in
        vain and chance had no part in it, or through so many that the set may as well be empty. Slices that
        have no entry because consumers outnumber images (`had_entries` false) are no sign of that.

        Raises:
            DataError: the training set gives no image.
        """
        parts = sampler.parts
        slices = [item for item in group.items if isinstance(item, ShardSlice) and item.parts == parts]
        self._empty.update(slices)
        self._empty_count += len(slices) if had_entries else 0
        everything = len(self._empty) == sampler.shards * parts
        certain = everything and self.counts["sampled_out"] == self._sampled_out
        if certain or self._empty_count >= MAX_EMPTY:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()) if count)
            latest = "".join(f"\n  {message}" for message in self._latest)
            count = max(self._empty_count, len(self._empty))
            raise DataError(
                f"the training set gives no image: {count} shards or parts of shards had no usable "
                f"one ({counts}); check the data and the curation thresholds{latest}"
            )

    def flush(self) -> dict[str, Any]:
        """`counts` and `errors` since the last flush."""
        fresh = self.counts - self._reported
        self._reported = self.counts.copy()
        messages, self._messages = self._messages, []
        return {"counts": dict(fresh), "errors": messages}
