"""Who reads what: each image once per epoch, over any chain of interruptions and topologies."""

import math
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pixio.data.sampling import ResumedFrom, Sampler
from pixio.data.tar_index import Entry


class Consumers:
    """Index-level stand-ins of all consumers: they note (epoch, entry) and know where they stand."""

    def __init__(self, sampler: Sampler, sizes: list[int], first: int = 0) -> None:
        self.sampler, self.sizes = sampler, sizes
        self.positions = [(first, 0, 0)] * sampler.consumers
        self.seen: Counter = Counter()

    def index(self, shard: int) -> list[Entry]:
        return [Entry(f"{shard}/{i}") for i in range(self.sizes[shard])]

    def read(self, consumer: int, count: float, until_epoch: int = 10**9) -> None:
        number, group, done = self.positions[consumer]
        while count > 0 and number < until_epoch:
            groups = self.sampler.assign(number)[consumer]
            if group == len(groups):
                number, group, done = number + 1, 0, 0
                continue
            entries = groups[group].entries(self.index)
            end = int(min(len(entries), done + count))
            self.seen.update((number, entry.key) for _, entry in entries[done:end])
            count -= end - done
            done = end
            self.positions[consumer] = (number, group, done)
            if done == len(entries):
                group, done = group + 1, 0

    def successor(self, consumers: int) -> "Consumers":
        """Other consumers that resume from here."""
        past = ResumedFrom(self.sampler, tuple(self.positions))
        sampler = replace(self.sampler, consumers=consumers, resumed_from=past)
        after = Consumers(sampler, self.sizes, min(number for number, _, _ in self.positions))
        after.seen = self.seen
        return after


shard_sizes = st.lists(st.integers(0, 7), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(shard_sizes, st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_each_image_is_read_by_exactly_one_consumer_per_epoch(sizes, consumers, shuffle, seed):
    readers = Consumers(Sampler(len(sizes), consumers, seed, shuffle), sizes)
    for consumer in range(consumers):
        readers.read(consumer, math.inf, until_epoch=3)
    everything = {(n, f"{s}/{i}") for n in range(3) for s, size in enumerate(sizes) for i in range(size)}
    assert readers.seen == dict.fromkeys(everything, 1)


@settings(max_examples=100, deadline=None)
@given(st.data(), shard_sizes, st.integers(0, 99))
def test_epochs_stay_exact_over_changes_of_topology(data, sizes, seed):
    total = sum(sizes)
    readers = Consumers(Sampler(len(sizes), data.draw(st.integers(1, 6)), seed, shuffle_shards=2), sizes)
    for _ in range(data.draw(st.integers(1, 3))):
        for consumer in range(readers.sampler.consumers):
            readers.read(consumer, data.draw(st.integers(0, 2 * total)))
        readers = readers.successor(data.draw(st.integers(1, 6)))
    last = max(number for number, _ in readers.seen) + 2 if readers.seen else 2
    for consumer in range(readers.sampler.consumers):
        readers.read(consumer, math.inf, until_epoch=last)
    everything = {(n, f"{s}/{i}") for n in range(last) for s, size in enumerate(sizes) for i in range(size)}
    assert readers.seen == dict.fromkeys(everything, 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 1000))
def test_consumers_get_epochs_of_nearly_equal_length(shards, consumers):
    units = shards * Sampler(shards, consumers, 0, 8).parts
    assert -(-units // consumers) <= 1.25 * (units // consumers)


def test_shards_and_samples_are_reshuffled_every_epoch():
    readers = Consumers(Sampler(40, 1, seed=0, shuffle_shards=4), [10] * 40)
    order = [
        [
            [entry.key for _, entry in group.entries(readers.index)]
            for group in readers.sampler.assign(number)[0]
        ]
        for number in (0, 1)
    ]
    assert [{key.split("/")[0] for key in group} for group in order[0]] != [
        {key.split("/")[0] for key in group} for group in order[1]
    ]
    positions = [{key: i for i, key in enumerate(chain(*groups))} for groups in order]
    pairs = np.array([[positions[0][key], positions[1][key]] for key in positions[0]])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.2  # 400 entries: 4 standard deviations
    # within a group the shards alternate instead of following each other
    changes = sum(a.split("/")[0] != b.split("/")[0] for a, b in pairwise(order[0][0]))
    assert changes > 20


def test_another_seed_gives_another_order():
    entries = [Entry(str(i)) for i in range(50)]
    groups = [Sampler(1, 1, seed, 8).assign(0)[0][0] for seed in (0, 1)]
    assert groups[0].entries(lambda shard: entries) != groups[1].entries(lambda shard: entries)
