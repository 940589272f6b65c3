"""Who reads which images, in what order.

A consumer is one worker process of one rank; an epoch visits every image once. A shard, or a slice of it
where there are too few shards, is the unit that is assigned: the slices of an epoch are shuffled and shared
out over the consumers; a consumer takes its slices in groups, and the entries of a group are permuted
together: a shuffle buffer that holds names instead of images. All of it is a pure function of the seed, so
that a position, (epoch, group, entries done), says everything about where a consumer is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pixio.data.randomness import generator
from pixio.data.tar_index import Entry

Position = tuple[int, int, int]  # epoch, groups of it that are done, entries done in the group under way


class ShardSlice(NamedTuple):
    """Every `parts`-th entry of a shard, from entry `part` on."""

    shard: int
    part: int
    parts: int


class Remainder(NamedTuple):
    """What an interrupted run left of a group that it had begun."""

    group: "Group"
    done: int


class Group(NamedTuple):
    """Slices whose entries are permuted together; `key` seeds the permutation."""

    items: tuple[ShardSlice | Remainder, ...]
    key: tuple[int, ...]

    def shards(self) -> list[int]:
        """Indices of the shards that hold the entries, each once."""
        nested = (
            [item.shard] if isinstance(item, ShardSlice) else item.group.shards() for item in self.items
        )
        return list(dict.fromkeys(shard for shards in nested for shard in shards))

    def entries(self, index: Callable[[int], Sequence[Entry]]) -> list[tuple[int, Entry]]:
        """The entries in the order in which they are visited, as (shard, entry); `index` lists a shard's."""
        found = []
        for item in self.items:
            if isinstance(item, ShardSlice):
                found += [(item.shard, entry) for entry in index(item.shard)[item.part :: item.parts]]
            else:
                found += item.group.entries(index)[item.done :]
        return [found[i] for i in generator("order", *self.key).permutation(len(found))]


class ResumedFrom(NamedTuple):
    """A run with other consumers that this one resumes: its sampler, and where each consumer stopped."""

    sampler: "Sampler"
    positions: tuple[Position, ...]

    @property
    def last_epoch(self) -> int:
        """The last epoch that any consumer had begun, in this run or one that it resumed."""
        before = self.sampler.resumed_from.last_epoch if self.sampler.resumed_from else 0
        return max(before, *(epoch for epoch, _, _ in self.positions))

    def unread(self, epoch: int) -> list[ShardSlice | Remainder]:
        """The part of an epoch that no consumer had read."""
        remainders: list[ShardSlice | Remainder] = []
        slices: list[ShardSlice | Remainder] = []
        for groups, (now, group, done) in zip(self.sampler.assign(epoch), self.positions, strict=True):
            if epoch > now:
                group, done = 0, 0
            elif epoch < now:
                group = len(groups)
            if done and group < len(groups):
                remainders.append(Remainder(groups[group], done))
                group += 1
            slices += [item for later in groups[group:] for item in later.items]
        return remainders + slices


@dataclass(frozen=True)
class Sampler:
    """Which consumer reads which entries of which epoch.

    Args:
        shards: number of shards.
        consumers: number of consumers: ranks times workers per rank.
        seed: of every permutation.
        shuffle_shards: slices whose entries are shuffled together.
        resumed_from: a run with other consumers, whose begun epochs are finished first. What it had read of
            an epoch is not read again, what it had not is; later epochs are assigned as if it had not been.
    """

    shards: int
    consumers: int
    seed: int
    shuffle_shards: int
    resumed_from: ResumedFrom | None = None

    @property
    def parts(self) -> int:
        """Slices per shard: as few as give all consumers epochs of equal length, to within a quarter."""
        parts = 1
        while self.shards * parts < 4 * self.consumers and self.shards * parts % self.consumers:
            parts += 1
        return parts

    def assign(self, epoch: int) -> list[list[Group]]:
        """The groups of an epoch, a list for each consumer."""
        if self.resumed_from and epoch <= self.resumed_from.last_epoch:
            items = self.resumed_from.unread(epoch)
        else:
            parts = self.parts
            slices = [ShardSlice(shard, part, parts) for shard in range(self.shards) for part in range(parts)]
            items = [slices[i] for i in generator(self.seed, "units", epoch).permutation(len(slices))]
        return [self._groups(items[c :: self.consumers], epoch, c) for c in range(self.consumers)]

    def _groups(self, items: Sequence[ShardSlice | Remainder], epoch: int, consumer: int) -> list[Group]:
        # the remainder of a group spans as many shards as a group does, so it makes a group of its own
        groups: list[list[ShardSlice | Remainder]] = [[item] for item in items if isinstance(item, Remainder)]
        slices: list[ShardSlice | Remainder] = [item for item in items if isinstance(item, ShardSlice)]
        groups += [slices[i : i + self.shuffle_shards] for i in range(0, len(slices), self.shuffle_shards)]
        return [Group(tuple(group), (self.seed, epoch, consumer, i)) for i, group in enumerate(groups)]

    def resumed_state(self) -> dict[str, Any] | None:
        """`resumed_from` in plain values, for a checkpoint."""
        if self.resumed_from is None:
            return None
        sampler, positions = self.resumed_from
        return {"positions": [list(position) for position in positions], "past": sampler.resumed_state()}

    def resume(self, state: dict[str, Any] | None) -> "Sampler":
        """This sampler, resumed from the run that `state` of `resumed_state` describes; None = from none."""
        if state is None:
            return replace(self, resumed_from=None)
        positions = tuple(tuple(position) for position in state["positions"])
        before = replace(self, consumers=len(positions)).resume(state["past"])
        return replace(self, resumed_from=ResumedFrom(before, positions))
