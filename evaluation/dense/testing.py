"""Evaluate a probe: sliding-window predictions, their metrics, and pictures of some.

Letters: n windows, O outputs of the head, H x W pixels, S side of a window.
"""

from typing import Any

import torch
from dense.data import Example, whole_examples
from dense.probe import Probe
from torch import Tensor
from tqdm import tqdm

from pixio.dense import slide
from pixio.engine.signals import Preempted
from pixio.images.normalization import normalize


def predict(probe: Probe, example: Example) -> Tensor:
    """Sliding-window prediction for one image: meters or classes, [H, W].

    Raises:
        ValueError: it is not finite; the message names the image.
    """

    def predict_windows(windows: Tensor) -> Tensor:
        with probe.runtime.autocast():
            logits = probe.head(probe.frozen(windows), windows.shape[-2:])  # [n, O, S, S]
        return probe.task.average(logits)

    image = normalize(example.image.to(probe.runtime.device, non_blocking=True))
    averages = slide(predict_windows, image, probe.size, probe.stride, probe.config.window_batch)
    if not averages.isfinite().all():
        raise ValueError(
            f"the prediction for {example.names[0]} is not finite: the head has diverged, or the encoder "
            "overflows; lower --lr, or use --dtype fp32"
        )
    return probe.task.decide(averages)


@torch.inference_mode()
def evaluate(probe: Probe) -> dict[str, Any]:
    """Collective: the metrics of all validation images, each seen by exactly one rank.

    Raises:
        Preempted: on all ranks, when one is asked to stop.
    """
    runtime, scores = probe.runtime, probe.task.make_scores()
    indices = range(runtime.rank, len(probe.val), runtime.world_size)
    examples = whole_examples(probe.val, indices, probe.config.num_workers, runtime.pins_memory)
    probe.head.eval()
    hidden = None if runtime.is_main else True  # None: where nobody watches
    examples = tqdm(examples, "evaluate", len(indices), leave=False, disable=hidden)
    for index, example in zip(indices, examples, strict=True):
        scores.add(index, predict(probe, example), example.target.to(runtime.device))
        everyone = index - runtime.rank + runtime.world_size <= len(probe.val)  # has an image in this round
        if everyone and runtime.asked_to_stop():
            raise Preempted
    probe.head.train()
    return scores.summarize(runtime.gather(scores.state))


@torch.inference_mode()
def draw_panels(probe: Probe) -> None:
    """Picture of a few validation images, evenly spaced; rank 0 alone."""
    if not probe.runtime.is_main or not probe.config.panels:
        return
    count = min(probe.config.panels, len(probe.val))
    indices = [i * len(probe.val) // count for i in range(count)]
    examples = list(whole_examples(probe.val, indices, num_workers=0, pin_memory=False))
    probe.head.eval()
    predictions = [predict(probe, example).cpu() for example in examples]
    probe.head.train()
    images, targets = [example.image for example in examples], [example.target for example in examples]
    probe.task.draw(probe.output / "panels.png", images, targets, predictions)
