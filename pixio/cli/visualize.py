"""The commands of `pixio` that draw."""

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from pixio.cli.common import (
    PICTURES,
    add_encoder,
    add_input,
    load_encoder,
    make_transform,
    new_file,
    positive,
)

if TYPE_CHECKING:
    from pixio.cli.drawing import Seen


def _add_features_of_images(parser: ArgumentParser, output: str) -> None:
    """Flags of the pictures of features."""
    parser.add_argument("images", nargs="+", help="image files")
    add_encoder(parser)
    add_input(parser, "resize")
    parser.add_argument("--block", type=int, default=-1, help="whose features, negative ones from the end")
    parser.add_argument("--smooth", action="store_true", help="interpolate between patches")
    parser.add_argument("--output", type=new_file(*PICTURES), default=output, help="picture to write")


def _look(
    images: list[str],
    pretrained: str | None,
    model: str | None,
    num_heads: int | None,
    device: str,
    size: int | None,
    fit: str,
    block: int,
) -> "list[Seen]":
    """Encode each image by itself, at its own size."""
    from pixio.cli import drawing
    from pixio.engine.runtime import start_runtime

    runtime = start_runtime(device, "fp32")
    encoder = load_encoder(model, pretrained, num_heads).to(runtime.device)
    transform = make_transform(encoder, size, fit)
    return [drawing.look(encoder, image, transform, block) for image in images]


def _stems(images: list[str]) -> list[str]:
    return [Path(image).stem for image in images]


def _add_pca(add) -> None:
    parser = add(pca, "cat.jpg dog.jpg --pretrained pixio_vith16.pth --size 512 --foreground")
    _add_features_of_images(parser, "pca.png")
    parser.add_argument("--foreground", action="store_true", help="leave the background out of the PCA")


def pca(images: list[str], foreground: bool, smooth: bool, output: Path, **encoder) -> None:
    """Draw the joint PCA of the patch features of one or several images.

    Red, green and blue are the first three components over the patches of all images together: what looks
    alike in the picture looks alike to the encoder.
    """
    from pixio.cli import drawing

    explained = drawing.save_pca(_look(images, **encoder), output, foreground, smooth, _stems(images))
    print(f"{len(images)} images -> {output}: {explained:.1%} of the variance")


def _add_tokens(add) -> None:
    _add_features_of_images(add(tokens, "photo.jpg --pretrained pixio_vith16.pth --size 512"), "tokens.png")


def tokens(images: list[str], smooth: bool, output: Path, **encoder) -> None:
    """Draw how similar each class token is to the patches."""
    from pixio.cli import drawing

    drawing.save_tokens(_look(images, **encoder), output, smooth, _stems(images))
    print(f"{len(images)} images -> {output}")


def _add_similarity(add) -> None:
    parser = add(similarity, "a.jpg b.jpg --point 120 80 --pretrained pixio_vith16.pth --size 512")
    _add_features_of_images(parser, "similarity.png")
    parser.add_argument(
        "--point",
        type=float,
        nargs=2,
        metavar=("X", "Y"),
        action="append",
        required=True,
        help="pixel of the first image whose patch is compared; may be given several times",
    )


def similarity(images: list[str], point: list[list[float]], smooth: bool, output: Path, **encoder) -> None:
    """Draw how similar the patch at a point is to all patches of all images."""
    from pixio.cli import drawing

    points = [(x, y) for x, y in point]
    drawing.save_similarity(_look(images, **encoder), points, output, smooth, _stems(images))
    print(f"{len(images)} images -> {output}")


def _add_reconstruct(add) -> None:
    parser = add(reconstruct, "a.jpg b.jpg --checkpoint runs/x/checkpoints/step_00001000")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--checkpoint", required=True, help="training checkpoint (encoder and decoder)")
    parser.add_argument(
        "--output",
        type=new_file(*PICTURES, ".gif", ".apng"),
        default="reconstruction.png",
        help="picture to write; with --sweep a .gif, or an animated .png",
    )
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="share of masked cells")
    parser.add_argument(
        "--mask_grid", type=positive, help="cell side in patches; as in training when left out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--draws", type=positive, default=1, help="different masks for each image")
    parser.add_argument("--sweep", action="store_true", help="animate from nothing to almost all masked")
    parser.add_argument("--size", type=positive, help="pixels per side; as in training when left out")


def reconstruct(
    images: list[str],
    checkpoint: str,
    output: Path,
    mask_ratio: float,
    mask_grid: int | None,
    seed: int,
    draws: int,
    sweep: bool,
    size: int | None,
) -> None:
    """Draw original, masked, reconstruction and pasted, one row per image and draw of the mask."""
    import torch

    import pixio
    from pixio.cli import drawing
    from pixio.images.crops import load_image

    if sweep and draws > 1:
        raise ValueError(f"--draws {draws}: a --sweep shows one mask")
    if sweep != (output.suffix in (".gif", ".apng")) and not (sweep and output.suffix == ".png"):
        raise ValueError(
            f"--output {output}: --sweep needs .gif, .png or .apng, pictures {', '.join(PICTURES)}"
        )
    mae = pixio.load_mae(checkpoint, **({"mask_grid": mask_grid} if mask_grid else {})).eval()
    pixels = torch.cat([load_image(path, size or mae.encoder.img_size[0]) for path in images])
    if sweep:
        drawing.save_sweep(mae, pixels, output, seed, _stems(images))
    else:
        drawing.save_reconstructions(mae, pixels, output, mask_ratio, seed, draws, _stems(images))
    print(f"{len(images)} images -> {output}")


def _add_curves(add) -> None:
    parser = add(curves, "runs/first runs/second")
    parser.add_argument("logs", nargs="+", help="log.jsonl files or the folders they lie in")
    parser.add_argument("--output", type=new_file(*PICTURES), default="curves.png", help="picture to write")


def curves(logs: list[str], output: Path) -> None:
    """Draw loss and learning rate of one or several runs."""
    from pixio.cli import drawing

    drawing.save_curves(logs, output)
    print(f"{len(logs)} runs -> {output}")


def _add_report(add) -> None:
    parser = add(report, "runs/first --images a.jpg b.jpg")
    parser.add_argument("folder", metavar="RUN", help="output folder of a run, with log.jsonl")
    parser.add_argument(
        "--output", type=new_file(".html"), help="page to write; RUN/report.html when left out"
    )
    parser.add_argument(
        "--images", nargs="+", default=[], help="files to reconstruct; rendered scenes when left out"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="where more results.json of evaluations lie",
    )


def report(folder: str, output: Path | None, images: list[str], results: list[str]) -> None:
    """Gather a run into one self-contained HTML page.

    It holds curves, reconstructions, evaluations (results.json in the run, and in folders beside it if they
    evaluated its encoder) and the configuration.
    """
    from pixio.cli.report import write_report

    output = output or Path(folder) / "report.html"
    write_report(folder, output, images, results)
    print(f"{folder} -> {output}")


COMMANDS = (_add_pca, _add_tokens, _add_similarity, _add_reconstruct, _add_curves, _add_report)
