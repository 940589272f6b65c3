"""The whole of Pixio in minutes on rendered scenes: pre-train, look at it, extract features, measure what was
learnt.

`make demo` runs it. Every stage is a command that is printed and that you can run yourself; what is done is
not done again, so that a second `make demo` resumes or says that all is there. Everything lies in
`runs/demo`.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import pixio
from pixio.data import normalise
from pixio.data.scenes import CLASS_NAMES, LABEL_NAMES, render
from pixio.engine.checkpoint import write_atomic
from pixio.mae import patchify

OUT = Path("runs/demo")
SIZE, PATCH = 128, 16
PROBE_TRAIN, PROBE_TEST = (
    range(1 << 33, (1 << 33) + 600),
    range(1 << 34, (1 << 34) + 300),
)  # scenes never trained on
PRETRAIN = f"""
    pretraining/main_pretrain.py --output_dir {OUT}/pretrain
    --model pixio_vitpico16_enc128x6h4_dec128x2h4 --input_size {SIZE}
    --norm_pix_loss --mask_ratio 0.625 --mask_grid 2
    --dataset_type imagenet --data_path {OUT}/tars --crop_scale_min 0.4 --num_workers 1
    --batch_size 64 --lr 4e-3 --epochs 20 --iters_per_epoch 100 --warmup_epochs 2
    --log_freq 20 --save_steps 500 --save_minutes 1 --save_freq 0
"""


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)

    step("1. Render scenes into ImageNet-style tars")
    run(f"-m pixio scenes imagenet-tars {OUT}/tars --train 4000 --val 8 --size {SIZE} --workers 2")

    step("2. Pre-train a small Pixio on them")
    run(PRETRAIN)

    step("3. Look at the run and at what it reconstructs")
    photos = write_photos(8)
    checkpoint = OUT / "pretrain/checkpoints" / (OUT / "pretrain/checkpoints/latest").read_text().strip()
    run(f"-m pixio curves {OUT}/pretrain --output {OUT}/loss.png")
    run(f"-m pixio reconstruct {photos} --checkpoint {checkpoint} --output {OUT}/reconstruction.png")

    step("4. Extract features")
    encoder = f"{OUT}/pretrain/encoder.pth"
    run(f"-m pixio features {photos} --pretrained {encoder} --size {SIZE} --output {OUT}/features.npz")

    step("5. Measure what the encoder knows about scenes it has never seen")
    rows = measure(encoder)
    table = markdown(rows)
    write_atomic(OUT / "table.json", lambda file: file.write(json.dumps(rows, indent=2).encode()))
    write_atomic(OUT / "table.md", lambda file: file.write(table.encode()))
    print(f"\n{table}\nAll of it lies in {OUT}: loss.png, reconstruction.png, features.npz, table.md")


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def run(command: str) -> None:
    """Run `python …` from the root of the repository and stop at its first failure."""
    words = shlex.split(command)
    print("$ python " + " ".join(words), flush=True)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        raise SystemExit(f"the demo stopped: this command ended with status {code}")


def write_photos(count: int) -> str:
    """Save a few held-out scenes as PNG files; their names, for a command line."""
    from PIL import Image

    names = []
    for seed in PROBE_TEST[:count]:
        names.append(f"{OUT}/scene{seed - PROBE_TEST[0]}.png")
        Image.fromarray(render(seed, SIZE).image).save(names[-1])
    return " ".join(names)


# ------------------------------------------------------------------------------------------------ probes
# B scenes, N patches of a scene, D features, K classes


def measure(encoder_file: str) -> list[dict]:
    """Probe raw pixels, the encoder at a random start and the pre-trained encoder, all in the same way."""
    train, test = load(PROBE_TRAIN), load(PROBE_TEST)
    torch.manual_seed(0)
    random = pixio.pixio_vitpico16(img_size=SIZE)
    trained = pixio.pixio_vitpico16(encoder_file, img_size=SIZE)
    views = {"raw pixels": raw_features, "random encoder": random, "pre-trained encoder": trained}
    return [{"features": name, **probe(view, train, test)} for name, view in views.items()]


def load(seeds: range) -> dict[str, Tensor]:
    """Images uint8 [B, 3, H, W]; of each patch majority class and mean log depth [B, N]; labels [B]."""
    scenes = [render(seed, SIZE) for seed in seeds]
    patches = lambda maps: patchify(torch.stack(maps).unsqueeze(1), PATCH)  # noqa: E731  [B, N, p*p]
    return {
        "images": torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes]),
        "classes": patches([torch.from_numpy(scene.semantics).long() for scene in scenes]).mode(-1).values,
        "log_depth": patches([torch.from_numpy(scene.depth).log() for scene in scenes]).mean(-1),
        "labels": torch.tensor([scene.label for scene in scenes]),
    }


def raw_features(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of each patch [B, N, D], and a small copy of the image [B, D'] for k-NN."""
    pixels = normalise(images)
    return patchify(pixels, PATCH), F.interpolate(pixels, size=32, mode="area").flatten(1)


@torch.inference_mode()
def encoder_features(encoder: pixio.PixioViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final patch tokens [B, N, D], and the mean class token [B, D] before the norm for k-NN."""
    outputs = [encoder.eval()(normalise(chunk), block_ids=[-1])[0] for chunk in images.split(100)]
    tokens = torch.cat([output["patch_tokens_norm"] for output in outputs])
    return tokens, torch.cat([output["cls_tokens"].mean(dim=1) for output in outputs])


def probe(view, train: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, float]:
    """Closed-form ridge regressions on single patch tokens, and weighted k-NN on whole images."""
    extract = view if view is raw_features else lambda images: encoder_features(view, images)
    (tokens, image), (test_tokens, test_image) = extract(train["images"]), extract(test["images"])
    targets = torch.cat(
        [F.one_hot(train["classes"], len(CLASS_NAMES)).float(), train["log_depth"].unsqueeze(-1)], dim=-1
    )
    predicted = ridge(tokens.flatten(0, 1), targets.flatten(0, 1), test_tokens.flatten(0, 1))  # [B*N, K + 1]
    return {
        "mIoU": mean_iou(predicted[:, :-1].argmax(dim=1), test["classes"].flatten()),
        "depth R2": r2(predicted[:, -1], test["log_depth"].flatten()),
        "depth d1": within(predicted[:, -1], test["log_depth"].flatten(), ratio=1.25),
        "k-NN top-1": knn(image, train["labels"], test_image, test["labels"]),
    }


def ridge(x: Tensor, y: Tensor, x_test: Tensor, strength: float = 1e-5) -> Tensor:
    """Penalised least squares on standardised features x [n, D], y [n, K] -> [m, K] for x_test [m, D]."""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    a, b = (F.pad((features - mean) / std, (0, 1), value=1.0).double() for features in (x, x_test))
    gram = a.T @ a
    gram.diagonal().add_(strength * len(a))
    return (b @ torch.linalg.solve(gram, a.T @ y.double())).float()


def mean_iou(predicted: Tensor, target: Tensor) -> float:
    """Intersection over union, averaged over the classes."""
    pairs = [(predicted == k, target == k) for k in range(len(CLASS_NAMES))]
    return sum(((p & t).sum() / (p | t).sum().clamp(min=1)).item() for p, t in pairs) / len(pairs)


def r2(predicted: Tensor, target: Tensor) -> float:
    """Share of the variance explained: 1 is perfect, 0 is the mean."""
    return 1 - ((predicted - target).square().mean() / target.var(correction=0)).item()


def within(predicted: Tensor, target: Tensor, ratio: float) -> float:
    """Share of predictions within a factor of the truth; both are logarithms."""
    return ((predicted - target).abs() < torch.tensor(ratio).log()).float().mean().item()


def knn(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 10) -> float:
    """Top-1 of k nearest neighbours by cosine similarity, weighted by exp(similarity / 0.07)."""
    similarity, neighbours = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(k)
    votes = torch.zeros(len(queries), len(LABEL_NAMES))
    votes.scatter_add_(1, labels[neighbours], (similarity / 0.07).exp())
    return (votes.argmax(dim=1) == truth).float().mean().item()


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table; shares in per cent."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [f"{row[n]:.3f}" if n == "depth R2" else f"{100 * row[n]:.1f}" for n in names[1:]]
        lines.append(f"| {row['features']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
