"""The whole of Pixio in minutes on rendered scenes: pre-train, look at it, extract features, measure what was
learnt.

`make demo` runs it. Every stage but the last consists of commands that are printed and that you can run
yourself; the last is the probes below. Scenes, training and evaluations that are done are not done again, so
that a second `make demo` resumes. Everything lies in `runs/demo`.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import pixio
from pixio.files import read_json, write_json, write_text
from pixio.images.normalization import normalize
from pixio.models.mae import patchify
from pixio.synthetic.scenes import CLASS_NAMES, LABEL_NAMES, render

OUT = Path("runs/demo")
SIZE, PATCH = 128, 16
PROBE_TRAIN = range(1 << 33, (1 << 33) + 600)  # seeds of scenes never trained on
PROBE_TEST = range(1 << 34, (1 << 34) + 300)
PRETRAIN = f"""
    pretraining/main_pretrain.py --output_dir {OUT}/pretrain
    --model pixio_vitpico16_enc128x6h4_dec128x2h4 --input_size {SIZE}
    --norm_pix_loss --mask_ratio 0.625 --mask_grid 2
    --dataset_type imagenet --data_path {OUT}/tars --crop_scale_min 0.4 --num_workers 1
    --batch_size 64 --lr 4e-3 --epochs 15 --iters_per_epoch 100 --warmup_epochs 2
    --log_freq 20 --save_steps 500 --save_minutes 1 --save_freq 0
"""
DISTILL = f"""
    distillation/main_distill.py --output_dir {OUT}/distill
    --teacher_model pixio_vitpico16 --teacher_pretrained {OUT}/pretrain/encoder.pth --student_models
    pixio_vitfemto16 --dataset_type imagenet --data_path {OUT}/tars --crop_scale_min 0.4 --num_workers 1
    --input_size {SIZE} --mask_ratio 0 --batch_size 64 --lr 4e-3 --epochs 2 --iters_per_epoch 100
    --warmup_epochs 1
    --log_freq 20 --save_steps 0 --save_minutes 1 --save_freq 0
"""
EVALUATIONS = {  # name -> (program, the metric shown, its flags)
    "k-NN": ("eval_knn", "top1", f"--data_path {OUT}/folders --input_size {SIZE} --nb_knn 10"),
    "depth": (
        "eval_monodepth",
        "d1",
        f"--config evaluation/monodepth/configs/nyuv2_linear.yaml --data_root {OUT}/nyuv2",
    ),
    "segmentation": (
        "eval_semseg",
        "miou",
        f"--config evaluation/semseg/configs/ade20k_linear.yaml --data_root {OUT}/ade20k",
    ),
}
DENSE = f"--crop_size {SIZE} --epochs 2 --eval_freq 2 --batch_size 4 --batches_per_step 1 --lr 1e-2"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    encoder, student = f"{OUT}/pretrain/encoder.pth", f"{OUT}/distill/encoder_pixio_vitfemto16.pth"

    step("1. Render scenes: into ImageNet-style tars, and into the layouts of the evaluation's data sets")
    for layout, folder, train, val in (
        ("imagenet-tars", "tars", 4000, 0),
        ("imagenet-folders", "folders", 400, 200),
        ("nyuv2", "nyuv2", 160, 16),
        ("ade20k", "ade20k", 160, 40),
    ):
        sizes = f"--train {train} --val {val} --size {SIZE} --seed {int(layout != 'imagenet-tars')}"
        run(f"-m pixio scenes {layout} {OUT}/{folder} {sizes} --workers 2")

    step("2. Pre-train a small Pixio")
    run(PRETRAIN)

    step("3. Look at the run and at what it reconstructs")
    photos = write_photos(6)
    checkpoint = OUT / "pretrain/checkpoints" / (OUT / "pretrain/checkpoints/latest").read_text().strip()
    run(f"-m pixio curves {OUT}/pretrain --output {OUT}/loss.png")
    flags = f"--checkpoint {checkpoint} --mask_ratio 0.625 --output {OUT}/reconstruction.png"
    run(f"-m pixio reconstruct {photos} {flags}")
    few = " ".join(photos.split()[:4])
    run(f"-m pixio pca {few} --pretrained {encoder} --size {2 * SIZE} --smooth --output {OUT}/pca.png")

    step("4. Extract features")
    run(f"-m pixio features {photos} --pretrained {encoder} --size {SIZE} --output {OUT}/features.npz")

    step("5. Distill it into a smaller one")
    run(DISTILL)

    step("6. Evaluate with the published protocol: k-NN, linear depth, linear segmentation")
    encoders = {
        "random encoder": "pixio_vitpico16 --pretrained_ckp none",
        "pre-trained encoder": f"pixio_vitpico16 --pretrained_ckp {encoder}",
        "distilled student": f"pixio_vitfemto16 --pretrained_ckp {student}",
    }
    protocol = [{"features": name, **evaluate(name, flags)} for name, flags in encoders.items()]

    step("7. Probe single patch tokens on scenes the encoder has never seen")
    probes = measure(encoder, student)

    tables = f"{markdown(probes)}\n{markdown(protocol)}"
    write_json(OUT / "tables.json", {"probes": probes, "protocol": protocol})
    write_text(OUT / "tables.md", tables)
    print(
        f"\n{tables}\nIn {OUT}: loss.png, reconstruction.png, pca.png, features.npz, tables.md, evaluation/*/"
    )


def evaluate(name: str, encoder: str) -> dict[str, float]:
    """The last metrics of the three evaluation programs for an encoder, given as its flags."""
    row = {}
    for task, (program, metric, flags) in EVALUATIONS.items():
        output = OUT / "evaluation" / f"{name.replace(' ', '_')}_{task}"
        dense = "" if program == "eval_knn" else DENSE
        dense += f" --num_workers 1 --output_dir {output}"
        run(f"evaluation/{program}.py --encoder {encoder} {flags} {dense}")
        results = read_json(output / "results.json")
        row[f"{task} {metric}"] = (results["last"] if "last" in results else results["k"]["10"])[metric]
    return row


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


def measure(encoder_file: str, student_file: str) -> list[dict]:
    """Probe raw pixels, an encoder at its random start, the pre-trained and the distilled one, all alike."""
    train, test = load(PROBE_TRAIN), load(PROBE_TEST)
    torch.manual_seed(0)
    random = pixio.pixio_vitpico16(img_size=SIZE)
    views = {
        "raw pixels": raw_features,
        "random encoder": random,
        "pre-trained encoder": pixio.from_pretrained(encoder_file),
        "distilled student": pixio.from_pretrained(student_file),
    }
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
    pixels = normalize(images)
    return patchify(pixels, PATCH), F.interpolate(pixels, size=32, mode="area").flatten(1)


@torch.inference_mode()
def encoder_features(encoder: pixio.PixioViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final patch tokens [B, N, D], and the mean class token [B, D] before the norm for k-NN."""
    outputs = [encoder.eval()(normalize(chunk), block_ids=[-1])[0] for chunk in images.split(100)]
    tokens = torch.cat([output["patch_tokens_norm"] for output in outputs])
    return tokens, torch.cat([output["cls_tokens"].mean(dim=1) for output in outputs])


def probe(view, train: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, float]:
    """Ridge regressions on single patch tokens, and k-NN on whole images; all but R2 in per cent."""
    extract = view if view is raw_features else lambda images: encoder_features(view, images)
    (tokens, image), (test_tokens, test_image) = extract(train["images"]), extract(test["images"])
    targets = torch.cat(
        [F.one_hot(train["classes"], len(CLASS_NAMES)).float(), train["log_depth"].unsqueeze(-1)], dim=-1
    )
    predicted = ridge(tokens.flatten(0, 1), targets.flatten(0, 1), test_tokens.flatten(0, 1))  # [B*N, K + 1]
    return {
        "mIoU": 100 * mean_iou(predicted[:, :-1].argmax(dim=1), test["classes"].flatten()),
        "depth R2": r2(predicted[:, -1], test["log_depth"].flatten()),
        "depth d1": 100 * within(predicted[:, -1], test["log_depth"].flatten(), ratio=1.25),
        "k-NN top-1": 100 * knn(image, train["labels"], test_image, test["labels"]),
    }


def ridge(x: Tensor, y: Tensor, x_test: Tensor, strength: float = 1e-5) -> Tensor:
    """Penalized least squares on standardized features x [n, D], y [n, K] -> [m, K] for x_test [m, D]."""
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
    """The rows as a Markdown table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [f"{row[n]:.3f}" if n == "depth R2" else f"{row[n]:.1f}" for n in names[1:]]
        lines.append(f"| {row['features']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
