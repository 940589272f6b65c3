"""Exact k-nearest-neighbour classification: one search for the largest k, in blocks, with ties decided.

Of equally similar neighbours the one that comes first in the bank wins, of equally supported classes the
lower one: the outcome depends on no library's order. The protocol is DINO's
(https://github.com/facebookresearch/dino).

Letters: Q queries, N bank vectors, n of them in a block, D width, K neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import mkldnn

QUERIES = 512  # searched together; smaller products would waste the machine
_FEWEST = 256  # bank vectors of a block
_GROUP = 16  # similarities whose maximum says whether they are worth a look


def block_sizes(width: int, k: int, memory_gb: float, device: torch.device) -> tuple[int, int]:
    """How many bank vectors and how many queries may be held at once.

    Args:
        width: D.
        k: K.
        memory_gb: bound on what a search holds, in GiB.
        device: that searches.

    Returns:
        Bank vectors of a block, and queries, a multiple of QUERIES.

    Raises:
        ValueError: the bound is too low for the smallest search.
    """
    # Bytes of float32 vectors, as given and packed, and of similarities, candidates and their numbers.
    per_query = 8 * width + 32 * k
    per_vector = 8 * width + 32 * QUERIES
    least = (QUERIES * per_query + _FEWEST * per_vector) / 2**30
    if memory_gb < least:
        raise ValueError(f"--memory_gb {memory_gb:g} is too little: width {width}, k {k} need {least:.3f}")
    spare = (memory_gb - least) * 2**30 / 2
    queries = QUERIES * (1 + int(spare / per_query / QUERIES))
    # Larger blocks fall out of a CPU's cache; a GPU wants fewer, larger products.
    most = 2048 if device.type == "cpu" else 32768
    return min(_FEWEST + int(spare / per_vector), most), queries


class Nearest:
    """The K bank vectors most similar to each query, found block by block.

    Only the best K so far are kept. A block is scanned through the maxima of small groups of similarities:
    after the first blocks few groups hold anything better than what is already known.

    Args:
        queries: float32 [Q, D], on the device that searches.
        k: number of neighbours K, at most the size of the whole bank.
    """

    def __init__(self, queries: Tensor, k: int):
        self.parts = [_Part(part, k) for part in queries.split(QUERIES)]

    def add(self, block: Tensor, start: int) -> None:
        """Take another block into account; blocks come in the order of the bank.

        Args:
            block: float32 [n, D], finite.
            start: number of its first vector in the bank.
        """
        block = _packed(block)
        for part in self.parts:
            part.add(block, start)

    def result(self) -> tuple[Tensor, Tensor]:
        """Similarities and bank numbers of the neighbours, both [Q, K], the most similar first."""
        similarities = torch.cat([part.similarities for part in self.parts])
        indices = torch.cat([part.indices for part in self.parts])
        order = _ranked(similarities, indices)
        return similarities.gather(1, order), indices.gather(1, order)


class _Part:
    """At most QUERIES queries, and the best K of each so far, in any order."""

    def __init__(self, queries: Tensor, k: int):
        self.queries = _packed(queries)
        self.similarities = queries.new_full((len(queries), k), -torch.inf)
        self.indices = torch.zeros(len(queries), k, dtype=torch.int32, device=queries.device)

    def add(self, block: Tensor, start: int) -> None:
        similarities = F.linear(self.queries, block)  # [Q, n]
        similarities = similarities.to_dense() if similarities.is_mkldnn else similarities
        if spare := -block.shape[0] % _GROUP:
            similarities = F.pad(similarities, (0, spare), value=-torch.inf)
        similarities = similarities.unflatten(1, (-1, _GROUP))  # [Q, groups, _GROUP]
        maxima = similarities.amax(2)  # [Q, groups]
        better = int((maxima > self.similarities.amin(1, keepdim=True)).sum(1).max())
        groups = maxima.topk(better, sorted=False).indices  # [Q, better]
        rows = torch.arange(len(groups), device=groups.device).unsqueeze(1)
        inside = torch.arange(start, start + _GROUP, dtype=torch.int32, device=groups.device)
        values = torch.cat([self.similarities, similarities[rows, groups].flatten(1)], dim=1)
        places = (groups.int().unsqueeze(2) * _GROUP + inside).flatten(1)  # [Q, better * _GROUP]
        indices = torch.cat([self.indices, places], dim=1)
        chosen = _largest(values, indices, self.similarities.shape[1])  # [Q, K]
        self.similarities, self.indices = values.gather(1, chosen), indices.gather(1, chosen)


def _packed(matrix: Tensor) -> Tensor:
    """On a CPU, laid out for oneDNN, whose products are faster than BLAS's on many of them."""
    return matrix.to_mkldnn() if matrix.device.type == "cpu" and mkldnn.is_available() else matrix


def _largest(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """Positions [Q, k] of the k largest values of each row, unordered; of equal ones the lowest indices."""
    top, chosen = values.topk(k, sorted=False)
    tied = (values >= top.amin(1, keepdim=True)).sum(1) > k
    if tied.any():
        chosen[tied] = _ranked(values[tied], indices[tied])[:, :k]
    return chosen


def _ranked(values: Tensor, indices: Tensor) -> Tensor:
    """Positions that sort each row by falling value, equal ones by rising index."""
    by_index = indices.argsort(dim=1)
    return by_index.gather(1, values.gather(1, by_index).argsort(dim=1, descending=True, stable=True))


def count_correct(
    similarities: Tensor,
    labels: Tensor,
    targets: Tensor,
    ks: Sequence[int],
    temperature: float,
    n_classes: int,
) -> Tensor:
    """Classify by the votes of the first k neighbours, each weighing exp(similarity / temperature).

    A class that no neighbour belongs to is never among the predictions.

    Args:
        similarities: [Q, K], falling.
        labels: int64 [Q, K], class of each neighbour.
        targets: int64 [Q], class of each query.
        ks: rising numbers of neighbours, at most K.
        temperature: of the weights.
        n_classes: number of classes.

    Returns:
        int64 [len(ks), 2]: queries whose class is the first, or among the first five.
    """
    # Relative to the nearest neighbour: the ranking is the same, and no exponential overflows.
    weights = ((similarities - similarities[:, :1]).double() / temperature).exp()
    scores = weights.new_zeros(len(targets), n_classes)
    classes = torch.arange(n_classes, device=targets.device)
    targets = targets.unsqueeze(1)  # [Q, 1]
    counts, done = [], 0
    for k in ks:
        scores.scatter_add_(1, labels[:, done:k], weights[:, done:k])
        done = k
        own = scores.gather(1, targets)  # [Q, 1]
        ahead = ((scores > own) | ((scores == own) & (classes < targets))).sum(1)  # [Q]
        voted = own.squeeze(1) > 0
        counts.append(torch.stack([(voted & (ahead < top)).sum() for top in (1, 5)]))
    return torch.stack(counts)
