"""`pixio …`: models, features, pictures and rendered scenes from the command line.

Each command is a function here that reads its flags and calls the module that does the work; heavy modules
are imported by the command that needs them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="pixio", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_info, _add_features, _add_reconstruct, _add_curves, _add_scenes):
        add(commands)
    arguments = parser.parse_args(argv)
    run = arguments.run
    del arguments.run
    try:
        run(**vars(arguments))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"pixio: error: {error}\n")
        raise SystemExit(2) from None


def _command(commands, run, example: str) -> argparse.ArgumentParser:
    name = run.__name__.removeprefix("_")
    parser = commands.add_parser(
        name,
        help=run.__doc__.split("\n")[0],
        description=run.__doc__,
        epilog=f"example: pixio {name} {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_info(commands) -> None:
    parser = _command(commands, _info, "pixio_vith16")
    parser.add_argument("models", nargs="*", help="names; all when left out")


def _info(models: list[str]) -> None:
    """Print sizes and parameter counts."""
    import torch

    import pixio

    names = models or [*pixio.list_models(), *pixio.list_models(pretraining=True)]
    print(f"{'model':<42}{'width':>6}{'blocks':>7}{'heads':>6}{'encoder':>15}{'decoder':>13}")
    for name in names:
        with torch.device("meta"):
            model = pixio.create_model(name)
        encoder = getattr(model, "encoder", model)
        size = sum(p.numel() for p in encoder.parameters())
        rest = sum(p.numel() for p in model.parameters()) - size
        shape = f"{encoder.embed_dim:>6}{len(encoder.blocks):>7}{encoder.num_heads:>6}"
        print(f"{name:<42}{shape}{size:>15,}{f'{rest:,}' if rest else '':>13}")


def _add_features(commands) -> None:
    parser = _command(commands, _features, "photo.jpg --model pixio_vith16 --pretrained pixio_vith16.pth")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--model", required=True, help="encoder name, see `pixio info`")
    parser.add_argument("--pretrained", help="weight file; random weights when left out")
    parser.add_argument("--output", default="features.npz", help=".npz or .safetensors")
    parser.add_argument("--size", type=int, default=256, help="images are resized to size x size pixels")
    parser.add_argument("--device", default="auto", help="auto (a GPU if any), cpu, or a torch device")


def _features(
    images: list[str], model: str, pretrained: str | None, output: str, size: int, device: str
) -> None:
    """Write the last block's features of images, after the final norm.

    For each image `NAME/patch_tokens` [h, w, D], patches row by row, and `NAME/embedding` [D], the mean class
    token.
    """
    import torch

    import pixio
    from pixio.data.transforms import load_image, normalise
    from pixio.engine.checkpoint import write_atomic
    from pixio.engine.runtime import start_runtime

    if Path(output).suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--output {output}: end it in .npz or .safetensors")
    runtime = start_runtime(device, "fp32")
    encoder = pixio.create_model(model, pretrained).eval().to(runtime.device)
    grid = encoder.grid_of(size, size)
    features = {}
    for path in tqdm(images, unit="image"):
        pixels = normalise(load_image(path, size).to(runtime.device))
        with torch.inference_mode():
            last = encoder(pixels, block_ids=[-1])[0]
        features[f"{path}/patch_tokens"] = last["patch_tokens_norm"][0].unflatten(0, grid).cpu()
        features[f"{path}/embedding"] = last["cls_tokens_norm"][0].mean(dim=0).cpu()
    if output.endswith(".npz"):
        import numpy as np

        arrays = {name: tensor.numpy() for name, tensor in features.items()}
        write_atomic(output, lambda file: np.savez(file, **arrays))
    else:
        from safetensors.torch import save

        write_atomic(output, lambda file: file.write(save(features)))
    print(f"{len(images)} images -> {output}: {len(features)} arrays")


def _add_reconstruct(commands) -> None:
    parser = _command(commands, _reconstruct, "a.jpg b.jpg --checkpoint runs/x/checkpoints/step_00001000.pt")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--checkpoint", required=True, help="training checkpoint (encoder and decoder)")
    parser.add_argument("--output", default="reconstruction.png")
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--mask_grid", type=int, help="cell side in patches; as in training when left out")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--size", type=int, help="pixels per side; as in training when left out")


def _reconstruct(
    images: list[str],
    checkpoint: str,
    output: str,
    mask_ratio: float,
    mask_grid: int | None,
    seed: int,
    size: int | None,
) -> None:
    """Draw original, masked, reconstruction and pasted, one row per image."""
    import torch

    import pixio
    from pixio import pictures
    from pixio.data.transforms import load_image

    mae = pixio.load_mae(checkpoint, **({"mask_grid": mask_grid} if mask_grid else {})).eval()
    pixels = torch.cat([load_image(path, size or mae.encoder.img_size[0]) for path in images])
    torch.manual_seed(seed)
    panels = pictures.reconstruct(mae, pixels, mask_ratio)
    pictures.save_sheet(panels, output, names=[Path(path).stem for path in images])
    print(f"{len(images)} images -> {output}")


def _add_curves(commands) -> None:
    parser = _command(commands, _curves, "runs/first runs/second")
    parser.add_argument("logs", nargs="+", help="log.jsonl files or the folders they lie in")
    parser.add_argument("--output", default="curves.png")


def _curves(logs: list[str], output: str) -> None:
    """Draw loss and learning rate of one or several runs."""
    from pixio import pictures

    pictures.save_curves(logs, output)
    print(f"{len(logs)} runs -> {output}")


def _add_scenes(commands) -> None:
    parser = _command(commands, _scenes, "imagenet-tars data/scenes --train 2000 --val 200 --size 128")
    parser.add_argument("layout", help="imagenet-tars, imagenet-folders, web-tars, nyuv2, kitti, ade20k, …")
    parser.add_argument("root", help="folder to make")
    parser.add_argument("--train", type=int, default=1000, help="training images")
    parser.add_argument("--val", type=int, default=100, help="validation images")
    parser.add_argument("--size", type=int, default=128, help="pixels per side that are rendered")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes")


def _scenes(layout: str, root: str, train: int, val: int, size: int, seed: int, workers: int) -> None:
    """Render labelled indoor scenes in the layout of a real data set."""
    from pixio.data.scene_trees import write_tree

    print(write_tree(layout, root, train, val, size, seed, workers))
