"""Head files: a trained head, and all that is needed to predict with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixio.dense.heads import KINDS, head_blocks, make_head
from pixio.dense.outputs import Classes, Depth, Output
from pixio.files import write_atomic
from pixio.models.external import depth_of, fingerprint, load_encoder
from pixio.models.registry import from_pretrained
from pixio.weights.reading import read_file

# Of every published recipe, and what is assumed of older files, which do not say it:
WINDOW = 256  # crop size in pixels
_MIN_DEPTH = 0.001  # meters


def window_of(crop_size: int, patch_size: int) -> tuple[int, int]:
    """Side and stride of the protocol's windows in pixels: the crop lowered to whole patches, and 2/3 of it.

    Raises:
        ValueError: the crop is smaller than a patch.
    """
    size = crop_size // patch_size * patch_size
    if size < 1:
        raise ValueError(f"windows of {crop_size} pixels are below the patch size, {patch_size} pixels")
    return size, int(size * 2 / 3)


@dataclass(frozen=True)
class HeadFile:
    """A trained head on a frozen encoder.

    Attributes:
        identity: what the head is bound to: `task`, `head` (its kind), `encoder_sha256` (see
            `pixio.models.external.fingerprint`), `cls_concat`, `channels`, `outputs`, and for depth
            `max_depth`.
        state: of the module that `pixio.dense.make_head` makes.
        epoch: passes over the data it was trained for.
        output: what its outputs stand for.
        encoder: name as for `pixio.models.external.load_encoder`; None: an older file, which does not say it.
        pretrained: where the weights of the encoder were; None: nowhere, or an older file.
        block_ids: blocks the head reads; None: an older file, and those of `head_blocks`.
        patch_size: of the encoder; None: an older file.
        window: (side, stride) of the windows in pixels; None: an older file, and those of the published
            recipes.
    """

    identity: dict[str, Any]
    state: dict[str, Tensor]
    epoch: int
    output: Output
    encoder: str | None = None
    pretrained: str | None = None
    block_ids: tuple[int, ...] | None = None
    patch_size: int | None = None
    window: tuple[int, int] | None = None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: the disk refused.
        """
        told = ("identity", "state", "epoch", "encoder", "pretrained", "block_ids", "patch_size", "window")
        content = {key: getattr(self, key) for key in told} | {"output": vars(self.output)}
        write_atomic(path, lambda file: torch.save(content, file))

    def load_encoder(self, source: nn.Module | str | Path | None, path: str | Path) -> nn.Module:
        """The encoder that the head was trained on, in evaluation mode.

        Args:
            source: itself, its weights (of transformers: their folder), or None = where they were, or beside
                the head.
            path: of the head, for messages.

        Raises:
            ValueError: another encoder, or it is unknown which.
            FileNotFoundError: its weights are not there.
        """
        given = isinstance(source, nn.Module)
        encoder: Any = source if given else self._find_encoder(source, path)
        found, expected = fingerprint(encoder), self.identity["encoder_sha256"]
        if found != expected:
            named = "the encoder given" if given else source or self.pretrained or self.encoder
            origin = f", then at {self.pretrained}" if self.pretrained else ""
            raise ValueError(
                f"{path} was trained on another encoder: fingerprint {expected[:16]}, found {found[:16]} in "
                f"{named}; give the weights it was trained on ({self.encoder or 'name unknown'}{origin})"
            )
        return encoder.eval()

    def _find_encoder(self, source: str | Path | None, path: str | Path) -> nn.Module:
        library, _, folder = (self.encoder or "").partition("/")
        if library == "hf":
            return load_encoder(f"hf/{source or folder}")
        source = source or self.pretrained
        if source is None:
            known = f" ({self.encoder})" if self.encoder else ""
            raise ValueError(
                f"{path} does not say where the weights of its encoder{known} are: give their file "
                "(encoder=…, --pretrained)"
            )
        beside = Path(path).with_name(Path(source).name)  # where a run leaves an encoder that it trained
        if not Path(source).expanduser().exists() and str(source) == self.pretrained:
            source = beside
        if source is beside and not beside.exists():
            raise FileNotFoundError(
                f"the weights of {self.encoder} that {path} was trained on are no longer at "
                f"{self.pretrained}: give their file (encoder=…, --pretrained)"
            )
        return load_encoder(self.encoder, source) if self.encoder else from_pretrained(source).eval()

    def blocks(self, encoder: nn.Module) -> list[int]:
        """Blocks of `encoder` the head reads."""
        return list(self.block_ids or head_blocks(self.identity["head"], depth_of(encoder)))

    def make_head(self) -> nn.Module:
        """The head with its weights, in evaluation mode."""
        sizes = {"kind": self.identity["head"]}
        sizes |= {key: self.identity[key] for key in ("channels", "outputs")}
        try:
            if sizes["kind"] == "dpt":
                sizes["width"] = self.state["fuse.0.mix.bias"].numel()
            with torch.device("meta"):  # nothing is allocated for sizes that the weights do not have
                head = make_head(**sizes)
            head.load_state_dict({name: value.float() for name, value in self.state.items()}, assign=True)
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the weights of the head do not fit {sizes}: {' '.join(str(error).split())}"
            ) from None
        return head.eval()


def is_head(path: str | Path) -> bool:
    """Whether a path leads to a file that `read_head` reads."""
    return Path(path).is_file() and Path(path).suffix == ".pth" and "identity" in read_file(path)


def read_head(path: str | Path) -> HeadFile:
    """Read a head file, also one that older versions wrote: `identity`, `epoch` and `state` alone.

    Of an older file the nearest depth is taken to be 0.001 m, and its classes have numbers for names.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a head.
    """
    content = read_file(path)
    identity = content.get("identity")
    if not isinstance(identity, dict) or identity.get("head") not in KINDS:
        raise ValueError(
            f"{path} is not a head.pth of eval_monodepth.py or eval_semseg.py: its keys are "
            f"{', '.join(map(str, content))[:80]}"
        )
    told = ("encoder", "pretrained", "block_ids", "patch_size", "window")
    try:
        kind = Depth if identity["task"] == Depth.task else Classes
        if "output" in content:
            output = kind(**content["output"])
        elif kind is Depth:
            output = Depth(_MIN_DEPTH, identity["max_depth"])
        else:
            from pixio.images.targets import IGNORE  # here: it needs numpy, and `pixio.dense` torch alone

            output = Classes.of(tuple(f"class {c}" for c in range(min(identity["outputs"], IGNORE))))
        state, epoch = content["state"], content["epoch"]
        identity["encoder_sha256"], identity["channels"], identity["outputs"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no head file: {type(error).__name__} {error}") from None
    return HeadFile(identity, state, epoch, output, **{key: content.get(key) for key in told})
