"""The demo's probes against scikit-learn, and its tables."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.metrics import jaccard_score, r2_score
from sklearn.preprocessing import StandardScaler

import demo
from benchmarks import few_labels, hour, probes
from pixio.engine.config import parse


def test_probe_metrics_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator), torch.randn(200, 2, generator=generator)
    x_test, y_test = torch.randn(50, 6, generator=generator), torch.randn(50, 2, generator=generator)
    found = probes.ridge(x, y, x_test, strength=1e-3)
    scaler = StandardScaler().fit(x)
    expected = Ridge(alpha=1e-3 * 200).fit(scaler.transform(x), y).predict(scaler.transform(x_test))
    np.testing.assert_allclose(found, expected, atol=2e-3)  # ours shrinks the intercept, too
    assert probes.r2(found[:, 0], y_test[:, 0]) == pytest.approx(
        r2_score(y_test[:, 0], found[:, 0]), abs=1e-5
    )
    classes, truth = (torch.randint(0, 7, (500,), generator=generator) for _ in range(2))
    assert probes.mean_iou(classes, truth) == pytest.approx(jaccard_score(truth, classes, average="macro"))


def test_position_only_knows_the_mean_of_each_place():
    split = probes.load_split(0, 6, size=32, patch_size=16)
    other = {"images": split["images"][:2], **{k: split[k][:2] for k in ("classes", "log_depth")}}
    features = probes.position(16)(split["images"]).flatten(0, 1)  # [6 * 4, 4]
    found = probes.ridge(features, split["log_depth"].reshape(-1, 1), features[:4], strength=1e-9)
    np.testing.assert_allclose(found[:, 0], split["log_depth"].mean(0), atol=1e-3)
    assert set(probes.probe(probes.raw_pixels(16), split, other)) == {"mIoU", "depth R2"}


def test_the_verdict_states_margin_and_spread_and_goes_between_the_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "held_out_loss", lambda log: 0.7)
    row = lambda miou, r2: {"mIoU": miou, "depth R2": r2}  # noqa: E731
    rows = {
        "raw pixels": row([7.0], [0.01]),
        "position only": row([17.5], [0.08]),
        "random encoder": row([9.0, 9.5], [0.02, 0.02]),
        "pre-trained encoder": row([22.0, 23.0], [0.2, 0.22]),
    }
    verdict = demo.compare(rows, [0, 1])
    assert "by 5.0 mIoU and 0.130 depth R2 (5.0 and 6.5 times the range over 2 seeds)" in verdict
    assert "explains 30.0 % of the variance" in demo.describe_reconstruction([0, 1])
    assert "| pre-trained encoder | 22.5 (22.0-23.0) | 0.210 (0.200-0.220) |" in demo.markdown(rows)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- demo -->\nold\n<!-- /demo -->\nafter\n")
    demo.replace_section(page, "demo", verdict)
    assert page.read_text() == f"before\n<!-- demo -->\n{verdict}\n<!-- /demo -->\nafter\n"
    with pytest.raises(SystemExit, match="no section <!-- other -->"):
        demo.replace_section(page, "other", verdict)


def test_the_page_of_the_hour_is_written_from_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "assets", "run/checkpoints", "run/measured/few_labels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("step_00000001\n")
    for picture in ("few_labels/few_labels", "reconstruction"):
        (tmp_path / f"run/measured/{picture}.png").write_bytes(b"")
    commands, labels = [], []

    class Head:
        class_colors = ((0, 0, 0), (255, 0, 0))

        def __init__(self, file):
            self.depth = "abs_rel" in str(file)

        def __call__(self, photo):
            return torch.ones(128, 128, dtype=torch.float32 if self.depth else torch.uint8)

    monkeypatch.setattr(hour, "run", commands.append)

    def tuned(words):
        labels.append(parse(few_labels.BenchmarkConfig, words))
        return {"pre-trained": {2: [20.0, 22.0]}, "from scratch": {2: [10.0, 10.0]}}

    monkeypatch.setattr(few_labels, "main", tuned)
    monkeypatch.setattr(hour, "probe_all", lambda *_: {"raw pixels": {"mIoU": [7.04], "depth R2": [0.02]}})
    results = {"last": {"abs_rel": 0.25, "miou": 31.26}}
    monkeypatch.setattr(hour, "read_json", lambda path: results)
    monkeypatch.setattr(
        hour, "Predictor", SimpleNamespace(from_pretrained=lambda head, encoder, mode: Head(head))
    )
    monkeypatch.setattr("sys.argv", ["hour.py", "run", "--update_docs", "--labels", "2", "4"])
    hour.main()
    page = (tmp_path / "docs/hour.md").read_text()
    assert "| raw pixels | 7.0 | 0.020 |" in page
    assert "| pre-trained encoder, dpt | 0.250 | 31.3 |" in page
    assert "| 2 | 21.0 ± 1.0 | 10.0 ± 0.0 |" in page
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {
        "hour_few_labels.png",
        "hour_reconstruction.png",
        "hour_dense.png",
    }
    with Image.open(tmp_path / "assets/hour_dense.png") as picture:  # four rooms in a row, three rows
        assert (255, 0, 0) in {color for _, color in picture.getcolors(1 << 24)}
    assert labels[0].labels == (2, 4)
    assert labels[0].pretrained == "run/encoder.pth"
    for head in ("linear", "dpt"):
        assert sum(f"--head {head}" in command for command in commands) == 4
