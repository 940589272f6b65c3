"""Evaluate a probe: its predictions, their metrics, and pictures of some."""

from typing import Any

import torch
from dense.data import whole_examples
from dense.probe import Probe
from tqdm import tqdm

from pixio.engine.signals import Preempted


@torch.inference_mode()
def evaluate(probe: Probe) -> dict[str, Any]:
    """Collective: the metrics of all validation images, each seen by exactly one rank.

    Raises:
        Preempted: on all ranks, when one is asked to stop.
    """
    runtime, predictor, scores = probe.runtime, probe.predictor, probe.task.make_scores()
    indices = range(runtime.rank, len(probe.val), runtime.world_size)
    examples = whole_examples(probe.val, indices, probe.config.num_workers, runtime.pins_memory)
    probe.learner.eval()
    hidden = None if runtime.is_main else True  # None: where nobody watches
    examples = tqdm(examples, "evaluate", len(indices), leave=False, disable=hidden)
    for index, example in zip(indices, examples, strict=True):
        prediction = predictor.predict(example.image, example.names[0])
        scores.add(index, prediction, example.target.to(runtime.device))
        everyone = index - runtime.rank + runtime.world_size <= len(probe.val)  # has an image in this round
        if everyone and runtime.asked_to_stop():
            raise Preempted
    probe.learner.train()
    return scores.summarize(runtime.gather(scores.state))


@torch.inference_mode()
def draw_panels(probe: Probe) -> None:
    """Picture of a few validation images, evenly spaced; rank 0 alone."""
    if not probe.runtime.is_main or not probe.config.panels:
        return
    count = min(probe.config.panels, len(probe.val))
    indices = [i * len(probe.val) // count for i in range(count)]
    examples = list(whole_examples(probe.val, indices, num_workers=0, pin_memory=False))
    probe.learner.eval()
    predictions = [
        probe.predictor.predict(example.image, example.names[0]).cpu().numpy() for example in examples
    ]
    probe.learner.train()
    images = [example.image.permute(1, 2, 0).numpy() for example in examples]
    maps = {"ground truth": [example.target.numpy() for example in examples], "prediction": predictions}
    probe.task.draw(probe.output / "panels.png", images, maps)
