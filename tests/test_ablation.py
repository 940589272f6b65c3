"""The benchmark of the three changes: its smallest run, from the cost to the page, and that it resumes."""

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
