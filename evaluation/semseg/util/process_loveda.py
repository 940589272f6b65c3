"""Convert LoveDA's masks (0 = no data, 1-7 = classes) to 0-6 and 255 = ignored.

    python semseg/util/process_loveda.py data/loveda

The originals are kept in `masks_png_raw` beside `masks_png`. The converted masks are written to a temporary
folder, which is then renamed: run it again after an interruption, or once more; nothing is converted twice.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pixio.files import write_atomic
from pixio.images.listing import is_junk
from pixio.images.targets import IGNORE, drop_zero, open_mask

NCLASS = 7


def convert_folder(masks: Path) -> int:
    """Convert the masks of one folder.

    Returns:
        How many were converted; 0 if they were before.

    Raises:
        ValueError: an unreadable mask, or values that LoveDA's masks do not have; nothing has changed.
    """
    originals, temporary = masks.with_name("masks_png_raw"), masks.with_name(".masks_png.partial")
    if masks.exists() and originals.exists():
        return 0
    source = masks if masks.exists() else originals  # killed between the two renames below
    files = sorted(path for path in source.glob("*.png") if not is_junk(path.name))
    values = set().union(*(np.unique(open_mask(path).whole()).tolist() for path in files))
    if source is masks and IGNORE in values and max(values - {IGNORE}, default=0) < NCLASS:
        return 0
    if max(values, default=0) > NCLASS:
        raise ValueError(
            f"the masks in {source} hold {sorted(values)}, expected 0-{NCLASS} in original ones, or "
            f"0-{NCLASS - 1} and {IGNORE} in converted ones, not a mixture: unpack them again"
        )

    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    for path in files:
        mask = Image.fromarray(drop_zero(open_mask(path).whole()))
        write_atomic(temporary / path.name, lambda file, mask=mask: mask.save(file, "PNG"))
    if source is masks:
        masks.rename(originals)
    temporary.rename(masks)
    return len(files)


def main(argv: list[str]) -> None:
    """Convert all four folders of masks of a LoveDA tree."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit(f"usage: process_loveda.py DATA_ROOT\n\n{__doc__}")
    root = Path(argv[0])
    found = {masks.parent for name in ("masks_png", "masks_png_raw") for masks in root.glob(f"*/*/*/{name}")}
    halves = sorted(half for half in found if half.name in ("Rural", "Urban"))
    if not halves:
        raise SystemExit(
            f"process_loveda.py: error: no Train/Train/Rural/masks_png or the like in {root.absolute()}"
        )
    for half in halves:
        try:
            count = convert_folder(half / "masks_png")
        except (ValueError, OSError) as error:
            raise SystemExit(f"process_loveda.py: error: {error}") from error
        print(f"{half}: {count} masks converted" if count else f"{half}: converted already")


if __name__ == "__main__":
    main(sys.argv[1:])
