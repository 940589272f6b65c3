"""Features of labeled images for k-NN: one global embedding per image and block, computed once and stored.

Letters: n images, L blocks, D width, B images of a batch.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixio.data.shards import Shard
from pixio.features.extraction import Arrays, CenterCropped, FeatureExtractor, folder_shards, index_shards
from pixio.features.store import FeatureStore
from pixio.images.listing import IMAGE_SUFFIXES, list_files
from pixio.images.normalization import normalize

PART = 512  # images


@dataclass(frozen=True)
class LabeledFolder:
    """The images of one split, class by class.

    Attributes:
        root: folder with a folder for each class.
        shards: the images, PART of them in each.
        labels: int64 [n], number of each image's class.
        classes: names of the classes.
        digest: of the images' paths, sizes and times of change.
    """

    root: Path
    shards: list[Shard]
    labels: Tensor
    classes: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


def list_classes(root: Path, classes: list[str] | None = None) -> LabeledFolder:
    """List the images `CLASS/*` of a folder.

    Args:
        root: the folder of the split.
        classes: names of the classes, in order; None: those that have images here.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: a class that is not among `classes`.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root.absolute()}: expected {root.name}/CLASS/IMAGE in --data_path"
        )
    files = [file for file in list_files(root) if file.count(os.sep) == 1]
    if not files:
        raise FileNotFoundError(
            f"no image ({', '.join(IMAGE_SUFFIXES)}) in the class folders of {root.absolute()}"
        )
    files.sort(key=lambda file: file.split(os.sep))
    names = [file.partition(os.sep)[0] for file in files]
    classes = list(dict.fromkeys(names)) if classes is None else classes
    if foreign := sorted(set(names) - set(classes)):
        raise ValueError(f"{root.absolute()} has classes without training images: {', '.join(foreign[:4])}")
    numbers = {name: number for number, name in enumerate(classes)}
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(root / file)
        digest.update(b"%s\0%d %d\n" % (os.fsencode(file), status.st_size, status.st_mtime_ns))
    shards = folder_shards(str(root), str(root), files, PART)
    return LabeledFolder(
        root, shards, torch.tensor([numbers[name] for name in names]), classes, digest.hexdigest()
    )


@dataclass(frozen=True)
class PooledFeatures(CenterCropped):
    """One L2-normalized embedding [D] after each block, before the final norm, as `block_ID`.

    They are kept in half precision, 11 significant bits: as many as TF32 products would look at anyway.

    Attributes:
        pool: "cls", the mean of the class (and register) tokens; "first", the first of them; "patch", the
            mean of the patch tokens.
        block_ids: the L blocks.
    """

    pool: str
    block_ids: tuple[int, ...]
    remedy = "try --dtype fp32"

    def compute(self, encoder: nn.Module, images: Tensor) -> Arrays:
        """Embeddings of images uint8 [B, 3, S, S], float16 [B, D] each."""
        outputs = encoder(normalize(images), self.block_ids)
        if self.pool == "first":
            vectors = [output["cls_tokens"][:, 0].float() for output in outputs]
        else:
            vectors = [output[f"{self.pool}_tokens"].float().mean(1) for output in outputs]
        vectors = F.normalize(torch.stack(vectors), dim=2).half()  # [L, B, D]
        return {f"block_{i}": block for i, block in zip(self.block_ids, vectors, strict=True)}


def open_bank(split: LabeledFolder, folder: Path, extractor: FeatureExtractor, identity: str) -> FeatureStore:
    """Collective: all features of a split; those already in `folder` are used, the others shared out.

    Args:
        split: images.
        folder: holds the features of all splits and encoders, each in a folder of its own, which is found
            again only for the same settings and images: same path, size and time of change.
        extractor: of `PooledFeatures`.
        identity: tells the encoder's weights from others.

    Raises:
        ValueError: an unreadable image, or features that are not finite; the message names the file.
    """
    settings = {
        "encoder": identity,
        "dtype": str(extractor.runtime.dtype).removeprefix("torch."),
        "images": split.digest,
        **asdict(extractor.spec),
    }
    if extractor.runtime.is_main and (old := sorted(folder.glob("*/part_00000.npy"))):
        print(f"{old[0].parent} has features of an earlier version, which are not used: remove it")
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    parts = index_shards(split.shards, PART).parts
    store = FeatureStore(folder / f"{split.root.name}_{digest[:16]}", split.shards, parts, settings)
    store.fill(extractor, strict=True)
    return store
