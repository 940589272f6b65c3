"""What one teacher for several students saves, and where the time of a distillation step goes.

    export PYTHONPATH=distillation
    OMP_NUM_THREADS=2 python benchmarks/distill.py
    python benchmarks/distill.py --teacher pixio_vitl16 --students pixio_vits16 pixio_vitti16 --batch_size 128

Runs `main_distill.py` on rendered images with all students together and with each alone, in turn, several
times. Every run is the real program, timed from the end of its first step to the end of its last. Prints
medians over the rounds: seconds per step and of its parts, and the ratio together / sum of alone.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import main_distill
import torch
from timing import now

import pixio
from pixio.data import Loader
from pixio.synthetic.trees import write_tree


class Stopwatch:
    """Seconds inside the parts of the steps after the first; the device is waited for around each part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.ends: list[float] = []  # moments at which a step ended

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = now()
        yield
        if self.ends:
            self.seconds[name] += now() - start

    def timed(self, name: str, function: Callable, ends_step: bool = False) -> Callable:
        def call(*args, **kwargs):
            with self.part(name):
                result = function(*args, **kwargs)
            if ends_step:
                self.ends.append(now())
            return result

        return call

    def loader(self, *args, **kwargs) -> Iterator:
        """Stands for `Loader`: the same batches."""
        watch = self

        class Timed(Loader):
            def __iter__(self):
                batches = super().__iter__()
                while True:
                    with watch.part("data"):
                        batch = next(batches)
                    yield batch

        return Timed(*args, **kwargs)

    def per_step(self) -> dict[str, float]:
        steps = len(self.ends) - 1
        whole = (self.ends[-1] - self.ends[0]) / steps
        parts = {name: seconds / steps for name, seconds in self.seconds.items()}
        return {"step": whole, **parts, "rest": whole - sum(parts.values())}


def measure(flags: list[str], students: list[str]) -> dict[str, float]:
    """Seconds per step of one run, and of its parts."""
    watch = Stopwatch()
    timed = {
        "teacher_tokens": watch.timed("teacher", main_distill.teacher_tokens),
        "compute_gradients": watch.timed("students", main_distill.compute_gradients),
        "apply_gradients": watch.timed("students", main_distill.apply_gradients, ends_step=True),
        "Loader": watch.loader,
    }
    with (
        mock.patch.multiple(main_distill, **timed),
        tempfile.TemporaryDirectory() as output,
        contextlib.redirect_stdout(sys.stderr),
    ):
        main_distill.main([*flags, "--output_dir", output, "--student_models", *students])
    return watch.per_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="pixio_vits16")
    parser.add_argument("--students", nargs="+", default=["pixio_vitti16", "pixio_vitpico16"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mask_ratio", default="0")
    parser.add_argument("--num_workers", default="1")
    parser.add_argument("--dtype", default="bf16")
    arguments = parser.parse_args()

    sets = [arguments.students, *([name] for name in arguments.students)]
    results: list[list[dict[str, float]]] = [[] for _ in sets]
    with tempfile.TemporaryDirectory() as folder:
        write_tree("imagenet-tars", folder, 256, 0, size=256, per_tar=64)
        torch.save(pixio.create_model(arguments.teacher).state_dict(), f"{folder}/teacher.pth")
        flags = ["--teacher_model", arguments.teacher, "--teacher_pretrained", f"{folder}/teacher.pth"]
        flags += ["--data_path", folder, "--batch_size", str(arguments.batch_size), "--epochs", "1"]
        flags += ["--iters_per_epoch", str(arguments.steps), "--warmup_epochs", "0", "--save_freq", "0"]
        flags += ["--mask_ratio", arguments.mask_ratio, "--num_workers", arguments.num_workers]
        flags += ["--dtype", arguments.dtype]
        for _ in range(arguments.rounds):
            for students, found in zip(sets, results, strict=True):
                found.append(measure(flags, students))

    print(f"teacher {arguments.teacher}, {arguments.batch_size} images per step, {arguments.dtype}")
    for students, found in zip(sets, results, strict=True):
        parts = {name: statistics.median(row[name] for row in found) for name in found[0]}
        shares = ", ".join(f"{name} {s / parts['step']:.0%}" for name, s in parts.items() if name != "step")
        print(f"{' + '.join(students)}: {parts['step']:.3f} s per step: {shares}")
    ratios = [
        together["step"] / sum(row["step"] for row in alone)
        for together, *alone in zip(*results, strict=True)
    ]
    print(f"together / sum of alone: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
