"""k-NN of 5,000 queries in a bank of 128,000 vectors of width 1280, k = 10, 20, 100 and 200: three ways.

    ours   one search for the largest k, in blocks, then all votes (pixio/features/knn.py)
    each   every k for itself, in 100 blocks of queries against the whole bank, as DINO's script does
           (https://github.com/facebookresearch/dino/blob/main/eval_knn.py)
    faiss  one search for the largest k in its exact index (pip install faiss-cpu), then our votes

    python benchmarks/knn.py [--quick] [--threads 1] [--rounds 3]

Runs alternate in one process on the same threads; ratios are medians over the rounds, by the clock and by CPU
time, which a machine shared with others disturbs less. Ours must be at least six times as fast as `each` and
no slower than faiss, which is left out where it is not installed.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pixio.features.knn import Nearest, count_correct

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CLASSES = 1000
BLOCK = 2048  # as `block_sizes` chooses on a CPU


def ours(bank: Tensor, labels: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
    search = Nearest(queries, KS[-1])
    for start in range(0, len(bank), BLOCK):
        search.add(bank[start : start + BLOCK], start)
    similarities, indices = search.result()
    return count_correct(similarities, labels[indices], targets, KS, TEMPERATURE, CLASSES)


def each(bank: Tensor, labels: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
    columns = bank.T
    counts = torch.zeros(len(KS), 2, dtype=torch.int64)
    for row, k in enumerate(KS):
        one_hot = torch.zeros(k, CLASSES)
        for part, wanted in zip(queries.chunk(100), targets.chunk(100), strict=True):
            similarities, indices = (part @ columns).topk(k, largest=True, sorted=True)
            neighbours = labels.expand(len(part), -1).gather(1, indices)
            one_hot.resize_(len(part) * k, CLASSES).zero_()
            one_hot.scatter_(1, neighbours.reshape(-1, 1), 1)
            weights = (similarities / TEMPERATURE).exp()
            scores = (one_hot.view(len(part), -1, CLASSES) * weights.unsqueeze(2)).sum(1)
            hits = scores.sort(1, descending=True).indices.eq(wanted.unsqueeze(1))
            counts[row] += torch.stack([hits[:, :1].sum(), hits[:, :5].sum()])
    return counts


def with_faiss(bank: Tensor, labels: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    similarities, indices = map(torch.from_numpy, index.search(queries.numpy(), KS[-1]))
    return count_correct(similarities, labels[indices], targets, KS, TEMPERATURE, CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the bank and of the queries")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    share = 8 if args.quick else 1
    size, n_queries, width = 128_000 // share, 5_000 // share, 1280

    torch.manual_seed(0)
    centers = torch.randn(CLASSES, width)
    labels = torch.arange(size) * CLASSES // size  # sorted by class, as a folder of images is
    targets = torch.arange(n_queries) * CLASSES // n_queries
    bank = F.normalize(0.2 * centers[labels] + torch.randn(size, width), dim=1)
    queries = F.normalize(0.2 * centers[targets] + torch.randn(n_queries, width), dim=1)

    ways: dict[str, Callable[..., Tensor]] = {"ours": ours, "each": each}
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(args.threads)
        ways["faiss"] = with_faiss
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    print(
        f"{size} x {width}, {n_queries} queries, k = {KS}, {args.threads} threads, torch {torch.__version__}"
    )
    for number in range(args.rounds):
        for name, way in ways.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            counts = way(bank, labels, queries, targets)
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - begin_cpu)
            top1 = " ".join(f"{100 * value / n_queries:.2f}" for value in counts[:, 0].tolist())
            seconds = f"{wall[name][-1]:7.2f} s, {cpu[name][-1]:7.2f} s of CPU"
            print(f"round {number + 1}  {name:5}  {seconds}  top-1 {top1}", flush=True)
    for name in list(ways)[1:]:
        ratios = [
            statistics.median(theirs / mine for theirs, mine in zip(clock[name], clock["ours"], strict=True))
            for clock in (wall, cpu)
        ]
        print(f"ours is {ratios[0]:.2f} times as fast as {name} ({ratios[1]:.2f} by CPU time)")


if __name__ == "__main__":
    main()
