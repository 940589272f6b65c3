"""Score web images for self-curation (paper, section 4), and look at what the scores keep and drop.

    python curate.py --data_path tars --json_path stats --checkpoint runs/first/checkpoints/step_00100000
    torchrun --nproc_per_node 8 curate.py …                     tars are shared out over the ranks
    python curate.py --data_path tars --json_path stats --only size,entropy              no model needed
    python curate.py report --data_path tars --json_path stats --output report

For each tar it writes `--json_path/<parent folder>/<tar name>.json`: member name -> `width` and `height` (in
pixels, upright), `histogram_score` (see `pixio.data.curation`) and `mae_loss`, or `error` if damaged.
`mae_loss` is the loss of the model in `--checkpoint` on the whole image, resized, with pixels normalized per
patch: the mean over `--mask_draws` masks that follow from the image's bytes, so that the same image gets the
same score wherever it lies. A file is written when its tar is finished; the same command resumes after
an interruption, and adds scores that are still missing.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import pixio
from pixio.data import Curation, find_shards
from pixio.data.curation import (
    ENTROPY_SIZE,
    SCORES,
    has_scores,
    known_records,
    statistics_paths,
    write_statistics,
)
from pixio.data.scoring import TarScorer
from pixio.data.shards import TarShard
from pixio.engine.config import option, parse
from pixio.engine.program import program
from pixio.engine.runtime import Runtime, start_runtime
from pixio.files import read_json, write_atomic, write_json
from pixio.images.crops import decode_crop, whole_box
from pixio.images.normalization import normalize
from pixio.models.mae import PixioMAE
from pixio.models.masking import cell_grid, count_kept

LOSS_DIGITS = 3  # floating point differs in the 7th digit between batch sizes
PATIENCE = 7 * 24 * 60  # minutes a rank waits at the end for slower ones


# ---------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class CurateConfig:
    """Compute the curation statistics of web tars. `curate.py report` shows what they keep and drop."""

    data_path: str = option(help="folder with tars, or their URLs")
    json_path: str = option(help="folder to write the statistics to")
    checkpoint: str | None = option(None, "training checkpoint of the model that computes the loss")
    only: str = option("size,entropy,loss", "scores to compute, separated by commas")
    mask_draws: int = option(4, "masks per image; 4 at ratio 0.75 show each patch once", ge=1)
    mask_ratio: float = option(0.75, "share of masked cells", gt=0, lt=1)
    seed: int = option(0, "random seed of the masks", ge=0)
    batch_size: int = option(64, "images per forward pass", ge=1)
    num_workers: int = option(6, "processes per rank, each reading its own tar", ge=0)
    device: str = option("auto", "auto (a GPU if there is one), cpu, or the name of a torch device")
    dtype: Literal["bf16", "fp16", "fp32"] = option("fp32", "autocast dtype")
    world_size: int | None = option(None, "number of processes, if started by hand; launchers set it", ge=1)
    local_rank: int | None = option(
        None, "index of this process, if started by hand", aliases=("local-rank",), ge=0
    )
    dist_url: str | None = option(
        None, "rendezvous address, if started by hand, such as tcp://127.0.0.1:29500"
    )

    def __post_init__(self) -> None:
        if unknown := set(self.scores) - set(SCORES):
            raise ValueError(f"--only {','.join(sorted(unknown))}: choose from {', '.join(SCORES)}")
        if ("loss" in self.scores) != (self.checkpoint is not None):
            raise ValueError("--checkpoint is needed for the loss, and only for it (--only size,entropy)")

    @property
    def scores(self) -> list[str]:
        """Names of the scores, keys of `SCORES`."""
        return self.only.split(",")

    @property
    def keys(self) -> list[str]:
        """Keys of a record that this run computes."""
        return [key for score in SCORES if score in self.scores for key in SCORES[score]]


@dataclass(frozen=True)
class ReportConfig:
    """Plot histograms of the scores, the share kept for each threshold, and images kept and dropped."""

    data_path: str = option(help="folder with tars, or their URLs")
    json_path: str = option(help="folder with the statistics")
    output: str = option("curation_report", "folder for report.json and the pictures")
    hist_thresh: float = option(4.5, "drop images with a histogram_score of at most this", ge=0)
    imgres_thresh: int = option(320, "drop images with a side below this, in pixels", ge=0)
    max_tars: int = option(100, "number of tars to sample, evenly spread over the data set", ge=1)
    images: int = option(48, "images on each contact sheet", ge=1)
    seed: int = option(0, "random seed for the choice of images", ge=0)


# ---------------------------------------------------------------------------------------------- scoring
@torch.inference_mode()
def reconstruction_losses(
    mae: PixioMAE,
    runtime: Runtime,
    pixels: Tensor,
    seeds: Sequence[int],
    batch_size: int,
    mask_ratio: float = 0.75,
    mask_draws: int = 4,
) -> list[float]:
    """The loss of each image, a function of its pixels and its seed alone.

    The masks of an image are taken from one random order of the cells: the first shows the first few, the
    second the next, and so on around. Batches are filled up to one size, so that the arithmetic
    is the same for each image.

    Args:
        mae: in evaluation mode, on the device of `runtime`.
        pixels: uint8 [n, 3, S, S], at most `batch_size`.
        seeds: one for each image.
        mask_ratio: share of masked cells.
        mask_draws: masks per image.

    Returns:
        Mean squared errors of normalized masked pixels, means over the masks, rounded.

    Raises:
        ValueError: one is not finite.
    """
    if not len(pixels):
        return []
    rows, columns = cell_grid(mae.encoder.grid_of(*pixels.shape[-2:]), mae.mask_grid)
    cells = rows * columns
    kept = count_kept(cells, mask_ratio)
    order = torch.zeros(batch_size, cells, dtype=torch.int64)
    for i, seed in enumerate(seeds):
        order[i] = torch.from_numpy(np.random.default_rng(seed).permutation(cells))
    order = order.to(runtime.device)
    batch = torch.zeros(batch_size, *pixels.shape[1:], dtype=torch.uint8)
    batch[: len(pixels)] = pixels
    images = normalize(batch.to(runtime.device))
    total = torch.zeros(batch_size, device=runtime.device)
    for draw in range(mask_draws):
        noise = (order - draw * kept) % cells
        with runtime.autocast():
            out = mae(images, mask_ratio, noise.float())
        # one image at a time, [1, …]: the loss is a mean over its batch
        total += torch.vmap(mae.loss)(images[:, None], out.pred[:, None], out.mask[:, None])  # [B]
    losses = total[: len(pixels)] / mask_draws
    if not losses.isfinite().all():
        raise ValueError("the loss of an image is not finite: use --dtype fp32, or another --checkpoint")
    return [round(loss, LOSS_DIGITS) for loss in losses.tolist()]


def curate(config: CurateConfig, runtime: Runtime) -> Counter[str]:
    """Write the statistics of this rank's tars; returns counts of images and of what was damaged."""
    shards = find_shards("webdataset", config.data_path, 0)
    paths = statistics_paths(shards, config.json_path)
    mae = None
    if config.checkpoint:
        mae = pixio.load_mae(config.checkpoint).eval().to(runtime.device)
        if not mae.norm_pix_loss:
            raise ValueError(
                f"{config.checkpoint} was not trained with --norm_pix_loss, so it gives another loss"
            )
    if runtime.device.type == "cpu":
        torch.set_num_threads(1)  # else sums, and so last digits, would depend on the number of cores
    check_settings(config, mae, runtime)

    mine = range(runtime.rank, len(shards), runtime.world_size)
    pending = [i for i in mine if not is_done(paths[i], config)]
    size = mae.encoder.img_size[0] if mae else ENTROPY_SIZE
    parts = DataLoader(
        TarScorer([shards[i] for i in pending], config.scores, size, config.batch_size),
        batch_size=None,
        num_workers=min(config.num_workers, len(pending)),
    )
    unfinished: dict[int, dict[str, Any]] = {}
    members: dict[int, int] = {}
    counts = Counter(tars_done_before=len(mine) - len(pending))
    with tqdm(unit="image", disable=not runtime.is_main, dynamic_ncols=True) as bar:
        for part in parts:
            shard, path = shards[pending[part.tar]], paths[pending[part.tar]]
            if part.error:
                counts["damaged_tars"] += 1
                bar.write(f"damaged tar {shard.name}: {part.error}", file=sys.stderr)
                if not part.members:
                    unfinished.pop(part.tar, None)
                    continue
            if mae:
                losses = reconstruction_losses(
                    mae,
                    runtime,
                    part.pixels,
                    [seed ^ config.seed for seed in part.seeds],
                    config.batch_size,
                    config.mask_ratio,
                    config.mask_draws,
                )
                for name, loss in zip(part.names, losses, strict=True):
                    part.records[name]["mae_loss"] = loss
            unfinished.setdefault(part.tar, {}).update(part.records)
            counts["images"] += len(part.records)
            counts["damaged_images"] += sum("error" in record for record in part.records.values())
            members[part.tar] = part.members
            bar.total = round(sum(members.values()) / len(members) * len(pending))
            bar.update(len(part.records))
            if part.last:
                write_statistics(path, unfinished.pop(part.tar))
                counts["tars"] += 1
    return counts


def is_done(path: str, config: CurateConfig) -> bool:
    """Whether a tar has all the scores that this run computes."""
    records = known_records(path).values()
    return bool(records) and all("error" in record or has_scores(record, config.keys) for record in records)


def check_settings(config: CurateConfig, mae: PixioMAE | None, runtime: Runtime) -> None:
    """Note what the losses are computed with beside them, and refuse to mix them with others.

    Raises:
        ValueError: the folder holds losses of another model or other masks.
    """
    if mae is None:
        return
    weights = mae.decoder_pred.weight.detach().cpu().numpy().tobytes()  # differ from step to step
    settings = {
        "model": hashlib.sha256(weights).hexdigest()[:16],
        **{name: getattr(config, name) for name in ("mask_draws", "mask_ratio", "seed", "dtype")},
    }
    path = Path(config.json_path) / "loss_settings.json"
    if path.exists() and (found := read_json(path)) != settings:
        raise ValueError(
            f"{path} says that the losses here come from {found}, not {settings}: choose another --json_path"
        )
    if runtime.is_main:
        write_json(path, settings)


# ---------------------------------------------------------------------------------------------- the report
class Scored(NamedTuple):
    """An image of the report."""

    tar: int
    name: str
    record: dict[str, Any]


def report(config: ReportConfig) -> None:
    """Write `report.json`, `histograms.png` and the contact sheets, and print the shares."""
    shards = find_shards("webdataset", config.data_path, 0)
    chosen = np.linspace(0, len(shards) - 1, min(len(shards), config.max_tars)).astype(int).tolist()
    records = {i: Curation(config.json_path).load(shards[i]) or {} for i in chosen}
    images = [
        Scored(i, name, record)
        for i, tar in records.items()
        for name, record in tar.items()
        if isinstance(record, dict)
    ]
    scored = [image for image in images if has_scores(image.record, SCORES["size"] + SCORES["entropy"])]
    if not scored:
        raise ValueError(
            f"{Path(config.json_path).absolute()} holds no histogram_score for the tars in {config.data_path}"
        )
    values = {
        "histogram_score": np.array([image.record["histogram_score"] for image in scored]),
        "shorter side": np.array([min(image.record["width"], image.record["height"]) for image in scored]),
        "mae_loss": np.array([image.record.get("mae_loss") for image in scored], dtype=float),  # None is NaN
    }
    scores, sides, losses = values["histogram_score"], values["shorter side"], values["mae_loss"]
    passes = (scores > config.hist_thresh) & (sides >= config.imgres_thresh)
    summary = {
        "images": len(images),
        "damaged": sum("error" in image.record for image in images),
        "kept by histogram_score above": {f"{t:g}": mean(scores > t) for t in np.arange(3, 6.5, 0.5)},
        "kept by shorter side from": {str(t): mean(sides >= t) for t in (128, 224, 256, 320, 384, 512)},
        f"kept by both, above {config.hist_thresh:g} and from {config.imgres_thresh}": mean(passes),
    }
    if np.isnan(losses).any():
        del values["mae_loss"]
    else:
        summary["mean of min(mae_loss, 1)"] = mean(np.minimum(losses, 1))
        summary["kept by all, on average"] = mean(passes * np.minimum(losses, 1))
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "report.json", summary)
    print(json.dumps(summary, indent=2))

    limits = {"histogram_score": config.hist_thresh, "shorter side": config.imgres_thresh, "mae_loss": 1.0}
    draw_histograms(values, limits, output / "histograms.png")
    order = np.random.default_rng(config.seed).permutation(len(scored))
    sheets = {
        "kept": order[passes[order]],
        "dropped": order[~passes[order]],
        "nearly_dropped": [i for i in np.argsort(scores) if passes[i]],
    }
    for name, chosen in sheets.items():
        draw_sheet([scored[i] for i in chosen[: config.images]], shards, output / f"{name}.png")


def mean(values: np.ndarray) -> float:
    """The mean, rounded for JSON."""
    return round(float(values.mean()), 4)


def draw_histograms(values: dict[str, np.ndarray], limits: dict[str, float], path: Path) -> None:
    """One histogram for each score, with its threshold."""
    from pixio.images.figures import figure, open_axes

    with figure(path, 4 * len(values), 3, dpi=120) as drawn:
        axes = drawn.subplots(1, len(values))
        open_axes(*axes)
        for axis, (name, numbers) in zip(axes, values.items(), strict=True):
            axis.hist(numbers, bins=60)
            axis.axvline(limits[name], color="black", linestyle="--")
            axis.set(xlabel=name, ylabel="images")


def draw_sheet(images: Sequence[Scored], shards: Sequence[TarShard], path: Path) -> None:
    """Small pictures of images in rows of eight, each with its scores below."""
    side, columns, caption = 128, 8, 14
    rows = max(1, -(-len(images) // columns))
    sheet = Image.new("RGB", (columns * side, rows * (side + caption)), "white")
    pen = ImageDraw.Draw(sheet)
    for at, (tar, name, record) in enumerate(images):
        x, y = at % columns * side, at // columns * (side + caption)
        with shards[tar].open(0) as source:
            entry = next((entry for entry in source.entries if entry.key == name), None)
            if entry is None:
                raise ValueError(
                    f"{shards[tar].name} has no member {name!r}, but its statistics have: remove them, and "
                    "compute them again"
                )
            pixels = decode_crop(source.read(entry), side, whole_box)
        sheet.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (x, y))
        words = [f"{record['histogram_score']:.1f}", f"{record['width']}x{record['height']}"]
        words += [f"{record['mae_loss']:.2f}"] if "mae_loss" in record else []
        pen.text((x + 2, y + side + 1), "  ".join(words), fill="black")
    write_atomic(path, lambda file: sheet.save(file, "PNG"))


# ---------------------------------------------------------------------------------------------- the program
def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run; a mistake or a failure ends the program with one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with program("curate.py", "train"):
        if arguments[:1] == ["report"]:
            return report(parse(ReportConfig, arguments[1:], prog="curate.py report"))
        config = parse(CurateConfig, arguments, prog="curate.py")
        os.makedirs(config.json_path, exist_ok=True)
        launcher = (config.world_size, config.local_rank, config.dist_url)
        runtime = start_runtime(config.device, config.dtype, *launcher, timeout_minutes=PATIENCE)
        try:
            counts = sum(runtime.gather(curate(config, runtime)), Counter())
        finally:
            runtime.close()
        if runtime.is_main:
            print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count))


if __name__ == "__main__":
    main()
