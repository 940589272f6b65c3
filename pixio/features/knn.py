"""Exact k-nearest-neighbor classification: one search for the largest k, in blocks, with ties decided.

Of equally similar neighbors the one that comes first in the bank wins, of equally supported classes the
lower one: the outcome depends on no library's order. The protocol is DINO's
(https://github.com/facebookresearch/dino).

Letters: Q queries, N bank vectors, n of them in a block, D width, K neighbors.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import mkldnn
from tqdm import tqdm

if TYPE_CHECKING:
    from pixio.features.store import StoredArray

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
        raise ValueError(
            f"--memory_gb {memory_gb:g} is too little: width {width} and k = {k} need {least:.3f} GiB"
        )
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
        k: number of neighbors K, at most the size of the whole bank.
    """

    def __init__(self, queries: Tensor, k: int):
        self.blocks = [_QueryBlock(block, k) for block in queries.split(QUERIES)]

    def add(self, block: Tensor, start: int) -> None:
        """Take another block into account; blocks come in the order of the bank.

        Args:
            block: float32 [n, D], finite.
            start: number of its first vector in the bank.
        """
        block = _packed(block)
        for queries in self.blocks:
            queries.add(block, start)

    def result(self) -> tuple[Tensor, Tensor]:
        """Similarities and bank numbers of the neighbors, both [Q, K], the most similar first."""
        similarities = torch.cat([queries.similarities for queries in self.blocks])
        indices = torch.cat([queries.indices for queries in self.blocks])
        order = _ranked(similarities, indices)
        return similarities.gather(1, order), indices.gather(1, order)


class _QueryBlock:
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


def class_scores(
    similarities: Tensor, labels: Tensor, ks: Sequence[int], temperature: float, n_classes: int
) -> Iterator[Tensor]:
    """For each k the votes that each class has from the first k neighbors, one exp(similarity / temperature).

    Args:
        similarities: [Q, K], falling.
        labels: int64 [Q, K], class of each neighbor.
        ks: rising numbers of neighbors, at most K.
        temperature: of the weights.
        n_classes: number of classes.

    Yields:
        float64 [Q, n_classes], relative to the vote of the nearest neighbor; added to for the next k.
    """
    # Relative to the nearest neighbor: the ranking is the same, and no exponential overflows.
    weights = ((similarities - similarities[:, :1]).double() / temperature).exp()
    scores, done = weights.new_zeros(len(weights), n_classes), 0
    for k in ks:
        scores.scatter_add_(1, labels[:, done:k], weights[:, done:k])
        done = k
        yield scores


def count_correct(
    similarities: Tensor,
    labels: Tensor,
    targets: Tensor,
    ks: Sequence[int],
    temperature: float,
    n_classes: int,
) -> Tensor:
    """Count correct classifications; a class that no neighbor belongs to is never among the predictions.

    Args:
        similarities, labels, ks, temperature, n_classes: see `class_scores`.
        targets: int64 [Q], class of each query.

    Returns:
        int64 [len(ks), 2]: queries whose class is the first, or among the first five.
    """
    classes = torch.arange(n_classes, device=targets.device)
    targets = targets.unsqueeze(1)  # [Q, 1]
    counts = []
    for scores in class_scores(similarities, labels, ks, temperature, n_classes):
        own = scores.gather(1, targets)  # [Q, 1]
        ahead = ((scores > own) | ((scores == own) & (classes < targets))).sum(1)  # [Q]
        voted = own.squeeze(1) > 0
        counts.append(torch.stack([(voted & (ahead < top)).sum() for top in (1, 5)]))
    return torch.stack(counts)


class KNNClassifier:
    """Classify by the votes of the K most similar vectors.

    `KNNClassifier(k=20).fit(features, labels).predict(queries)`. The search is exact. Vectors
    are read in blocks, from memory or from a `StoredArray`.

    Args:
        k: number of neighbors K, at most the number of vectors.
        temperature: a neighbor's vote weighs exp(similarity / temperature).
        normalize: compare by the cosine; False: by the inner product, of vectors that have length 1.
        memory_gb: bound on what a search holds, in GiB.
        device: that searches.
        progress: show a bar where somebody watches.
    """

    def __init__(
        self,
        k: int = 20,
        temperature: float = 0.07,
        normalize: bool = True,
        memory_gb: float = 4.0,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ):
        self.k, self.temperature, self.normalize = k, temperature, normalize
        self.memory_gb, self.device, self.progress = memory_gb, torch.device(device), progress

    def fit(
        self, features: "Tensor | StoredArray", labels: Tensor, n_classes: int | None = None
    ) -> "KNNClassifier":
        """Take the vectors to compare with.

        Args:
            features: [N, D], finite.
            labels: int64 [N], class of each, from 0.
            n_classes: number of classes; None: one more than the highest label.

        Raises:
            ValueError: other numbers of vectors and labels, or k below 1 or above the number of vectors.
        """
        if not 1 <= self.k <= len(features) == len(labels):
            raise ValueError(
                f"{len(features)} vectors with {len(labels)} labels for k = {self.k}: give each vector one "
                "label, and choose k from 1 to their number"
            )
        self.features, self.labels = features, labels
        self.n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
        return self

    def kneighbors(self, queries: "Tensor | StoredArray") -> tuple[Tensor, Tensor]:
        """Similarities and numbers of the neighbors of queries [Q, D], each [Q, K], most similar first."""
        _, similarities, indices = zip(*self._search(queries, 0, 1), strict=True)
        return torch.cat(similarities), torch.cat(indices)

    def predict(self, queries: "Tensor | StoredArray") -> Tensor:
        """Classes of queries [Q, D], int64 [Q]; of equally supported classes the lower one."""
        similarities, indices = self.kneighbors(queries)
        labels = self.labels[indices]  # [Q, K]
        (scores,) = class_scores(similarities, labels, [self.k], self.temperature, self.n_classes)
        return scores.argmax(1)

    def count_correct(
        self,
        queries: "Tensor | StoredArray",
        targets: Tensor,
        ks: Sequence[int],
        rank: int = 0,
        world_size: int = 1,
    ) -> Tensor:
        """Count correct classifications, for several k, among one rank's share of the queries.

        Queries are assigned QUERIES at a time: products have the same shapes, and so the same results, on any
        number of ranks.

        Args:
            queries: [Q, D].
            targets: int64 [Q], class of each.
            ks: rising numbers of neighbors, at most K.
            rank, world_size: of this process.

        Returns:
            int64 [len(ks), 2], see `count_correct`.
        """
        counts = torch.zeros(len(ks), 2, dtype=torch.int64)
        for span, similarities, indices in self._search(queries, rank, world_size):
            votes = (similarities, self.labels[indices], targets[span])
            counts += count_correct(*votes, ks, self.temperature, self.n_classes)
        return counts

    def _search(
        self, queries: "Tensor | StoredArray", rank: int, world_size: int
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Spans of at most QUERIES queries, with their similarities and neighbors [Q, K] on the CPU."""
        (n_bank, width), n = self.features.shape, len(queries)
        size, at_once = block_sizes(width, self.k, self.memory_gb, self.device)
        spans = [slice(i, min(i + QUERIES, n)) for i in range(0, n, QUERIES)][rank::world_size]
        hidden = None if self.progress else True  # None: where nobody watches
        while spans:
            held, spans = spans[: at_once // QUERIES], spans[at_once // QUERIES :]
            search = Nearest(self._vectors(torch.cat([queries[span] for span in held])), self.k)
            for start in tqdm(range(0, n_bank, size), "search", leave=False, disable=hidden):
                search.add(self._vectors(self.features[start : start + size]), start)
            found = (each.cpu().split(QUERIES) for each in search.result())
            yield from zip(held, *found, strict=True)

    def _vectors(self, vectors: Tensor) -> Tensor:
        """As they are compared: float32 [n, D], on the device."""
        vectors = vectors.to(self.device).float()
        return F.normalize(vectors, dim=1) if self.normalize else vectors
