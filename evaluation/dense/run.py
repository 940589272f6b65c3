"""One evaluation from its configuration to its results. The same command resumes a run that was stopped."""

import time
from typing import Any

from dense.config import DenseConfig
from dense.data import open_split
from dense.probe import Task, build_probe
from dense.results import publish
from dense.testing import draw_panels, evaluate
from dense.training import train_head

from pixio.engine.lock import lock_folder
from pixio.engine.runtime import Runtime
from pixio.engine.signals import defer_signals


def run(config: DenseConfig, task: Task, runtime: Runtime) -> dict[str, Any]:
    """Train a head, and some of the encoder if asked for, and evaluate it; with `eval_only` evaluate alone.

    Another run in the same folder is refused while this one lasts.

    Returns:
        What `results.json` in `--output_dir` holds; beside it lie `head.pth`, `encoder.pth` if some of the
        encoder was trained, `panels.png`, `log.jsonl` and `checkpoints/`.
    """
    probe = build_probe(config, task, runtime)
    with lock_folder(probe.output, runtime):
        if config.eval_only:
            began = time.monotonic()
            rows = [{"epoch": probe.epoch, **evaluate(probe), "seconds": time.monotonic() - began}]
            results = publish(probe, None, rows)
        else:
            train = open_split(task.data, config, "train", probe.window[0], runtime.is_main)
            with defer_signals():
                rows = train_head(probe, train)
            if runtime.is_main:
                probe.export()
            results = publish(probe, len(train), rows)
        draw_panels(probe)
    return results
