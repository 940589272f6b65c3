"""Weight files, folders, checkpoints and heads for `faults.py hostile`, and attacks in their place."""

import functools
import io
import json
import pickle
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from damage import unzip
from safetensors.torch import save

from pixio.dense.head_file import HeadFile
from pixio.dense.heads import make_head
from pixio.dense.outputs import Depth
from pixio.engine.checkpoint import Checkpoints
from pixio.engine.runtime import Runtime
from pixio.models.encoder import PixioViT
from pixio.models.mae import PixioMAE

Seed = dict[str, bytes]
MARKER = "executed"  # a pickle that was executed has made this file
ALONE = Runtime(torch.device("cpu"))


def _encoder() -> PixioViT:
    torch.manual_seed(0)
    return PixioViT(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, n_cls_tokens=1)


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Bomb:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARKER, "w")


def _inflated(state: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """The state dict of an encoder of width `n` whose tensors have one stored number."""
    shapes = {
        key: [n if side == 8 else 4 * n if side == 32 else 3 * n if side == 24 else side for side in v.shape]
        for key, v in state.items()
    }
    return {key: torch.zeros(1, dtype=torch.float16).expand(shape) for key, shape in shapes.items()}


@functools.cache
def torch_files() -> list[Seed]:
    state = _encoder().state_dict()
    circle: dict[str, Any] = dict(state)
    circle["model"] = circle
    content = {"model": state, "args": {"model": "x16_enc8x1h2_dec8x1h2"}, "epoch": 1}
    legacy = _saved(content, _use_new_zipfile_serialization=False)
    files = [
        _saved(state),
        _saved(content),
        legacy,
        legacy.replace(b"X\5\0\0\0model", b"X\0\0\0\x80model"),  # a key of 2 GiB
        _saved(state | {"x": Bomb()}),
        pickle.dumps(Bomb()),
        _saved(circle),
        _saved(_inflated(state, 1 << 14)),
        _deflated(_saved(state), 5 << 28),
        _saved(state).replace(b"PK\1\2", b"PK\1\3"),  # without the table of contents that its end tells of
    ]
    return [{"x.pth": data} for data in files]


def _deflated(data: bytes, size: int) -> bytes:
    """An archive with a part that unfolds to `size` zeros."""
    parts, buffer = unzip(data), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in zip(parts[::2], parts[1::2], strict=True):
            with archive.open(name.decode(), "w", force_zip64=True) as file:
                file.write(content)
                for _ in range(size >> 24 if name.endswith(b"/data.pkl") else 0):
                    file.write(bytes(1 << 24))
    return buffer.getvalue()


def safetensors_file() -> bytes:
    return save({key: value.contiguous() for key, value in _encoder().state_dict().items()})


def safetensors_files() -> list[Seed]:
    return [{"x.safetensors": safetensors_file()}]


def weight_folders() -> list[Seed]:
    weights, state = safetensors_file(), _encoder().state_dict()
    index = json.dumps({"weight_map": dict.fromkeys(state, "a.safetensors")}).encode()
    config = {"model_type": "pixio", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"image_size": 32, "patch_size": 16, "num_channels": 3, "n_cls_tokens": 1, "mlp_ratio": 4.0}
    text = json.dumps(config).encode()
    return [
        {"config.json": text, "model.safetensors": weights},
        {"model.safetensors.index.json": index, "a.safetensors": weights, "config.json": text},
        {"config.json": b"[" * 100_000, "model.safetensors": weights},
        {"model.safetensors.index.json": index.replace(b"a.safe", b"../a.safe"), "a.safetensors": weights},
    ]


def checkpoints() -> list[Seed]:
    mae = PixioMAE(_encoder(), 8, 1, 2, mask_grid=1)
    laughs: Any = 0
    for _ in range(64):
        laughs = [laughs, laughs]
    config = {"model": "x16_enc8x1h2_dec8x1h2", "mask_grid": 1, "norm_pix_loss": True}
    with TemporaryDirectory() as folder:
        Checkpoints(folder, ALONE).save(1, {"model": mae.state_dict(), "config": config})
        saved = Path(folder, "step_00000001")
        values, tensors = (saved / name for name in ("state.pt", "rank_00000.safetensors"))
        plain, whole = values.read_bytes(), tensors.read_bytes()
        content = torch.load(values, weights_only=True)
    huge = content["values"]["model"] | {"x": torch.empty(1 << 40, device="meta")}
    chunks = content["chunks"] | {"model/x": torch.tensor([[0, 0, 1 << 40]])}
    attacks = [
        content | {"values": content["values"] | {"laughs": laughs}},
        content | {"values": content["values"] | {"model": huge}, "chunks": chunks},
        content | {"values": Bomb()},
    ]
    states = [plain, *map(_saved, attacks)]
    return [{"state.pt": state, tensors.name: whole} for state in states]


def heads() -> list[Seed]:
    identity = {"task": "monodepth", "head": "linear", "encoder_sha256": "0" * 64, "cls_concat": False}
    identity |= {"channels": 8, "outputs": 1, "max_depth": 10.0}
    head = make_head("linear", 8, 1)
    with TemporaryDirectory() as folder:
        file = Path(folder, "head.pth")
        HeadFile(identity, head.state_dict(), 3, Depth(0.001, 10.0), "pixio_vits16", "x.pth").write(file)
        data = file.read_bytes()
    old = {"identity": identity, "state": head.state_dict(), "epoch": 1}
    huge = old | {"identity": identity | {"channels": 1 << 40}}
    odd = [old | {"identity": identity | {"task": []}}, {"identity": {"head": "linear"}, 1: 2}, huge]
    return [{"head.pth": content} for content in (data, *map(_saved, (old, *odd)))]
