"""The benchmark of the three changes: its smallest run, from the cost to the page, and that it resumes."""

import argparse
import json

from benchmarks import ablation

TINY = "--steps 2 --batch_size 4 --images 8 --held_out 4 --probe_scenes 4 2 --seeds 0 1 --num_workers 0"


def test_the_ablation_says_its_cost_runs_every_setting_and_does_finished_ones_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ablation, "SETTINGS", (ablation.SETTINGS[0], ablation.SETTINGS[-1]))
    monkeypatch.setattr("sys.argv", ["ablation.py", *TINY.split(), "--output", str(tmp_path)])
    ablation.main()
    told = capsys.readouterr().out
    assert "2 settings x 2 seeds x 2 steps: about 0.0 hours" in told
    assert "| Pixio: all three | 4 | 2 x 2 | 8 |" in told
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: len(rows) for name, rows in results.items()} == {"MAE": 2, "Pixio: all three": 2}
    assert results["MAE"][0] != results["MAE"][1]
    ablation.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000

    def fail(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(ablation, "train", fail)
    ablation.main()


def test_the_page_states_the_difference_and_how_far_seeds_move_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    first = [{"mIoU": 20.0, "depth R2": 0.1}, {"mIoU": 23.0, "depth R2": 0.1}]  # deviations 2.12 and 0
    last = [{"mIoU": 24.0, "depth R2": 0.3}, {"mIoU": 28.0, "depth R2": 0.2}]  # 2.83 and 0.071
    verdict = ablation.compare({"MAE": first, "Pixio: all three": last})
    options = argparse.Namespace(steps=7, batch_size=4, seeds=[0, 1], lr=1e-3, images=9)
    ablation.write_page(options, table="| a table |", verdict=verdict)
    page = (tmp_path / "docs/ablation.md").read_text()
    assert "+4.5 mIoU (standard deviation 3.5), +0.150 depth R2 (standard deviation 0.071)." in page
    assert "--steps 7 --update_docs` wrote this page:\n2 seeds of 4 images a step, lr 0.001," in page
