"""A sweep trains every experiment once, says what each came to, and does not do again what is done."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtimes.errors import InputError
from training import sweep
from training.models.hnet.spec import SPECS
from training.models.hnet.training import TRAINING
from training.recipe import Sweep

ROW = {
    "step": 3,
    "cpu_seconds": 1.4,
    "metrics": {"bits_per_byte": 1.25, "code_points_per_chunk": 2.0},
    "baselines": {"5gram": {"bits_per_byte": 1.5}},
}
TWO = Sweep(
    runs=lambda config, training: {"small": {"alpha": "0.03"}, "large": {"alpha": "5.0"}},
    columns=("bits_per_byte", "code_points_per_chunk"),
    plotted=("code_points_per_chunk", "bits_per_byte"),
)


EXPERIMENTS = replace(TRAINING, sweep=TWO)


def test_rows_are_kept_and_only_what_changed_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[dict[str, str]] = []
    monkeypatch.setattr(sweep, "run_one", lambda spec, preset, changes, *_: (ran.append(changes), ROW)[1])
    monkeypatch.setattr(sweep, "find_spec", lambda name: replace(SPECS[0], training_path=f"{__name__}:EXPERIMENTS"))
    arguments = ["hnet", "--out", str(tmp_path), "--lr", "1e-3"]
    assert sweep.main(arguments) == 0
    assert sweep.main(arguments) == 0
    assert [changes["alpha"] for changes in ran] == ["0.03", "5.0"]
    assert all(changes["lr"] == "1e-3" for changes in ran)
    assert sweep.main([*arguments[:-1], "2e-3"]) == 0
    assert len(ran) == 4
    rows = json.loads((tmp_path / sweep.ROWS).read_text())
    assert [row["name"] for row in rows] == ["small", "large"]
    assert (tmp_path / sweep.PLOT).read_bytes().startswith(b"\x89PNG")


def test_the_table_has_experiments_and_baselines_and_no_number_where_there_is_none() -> None:
    plain = {**ROW, "name": "transformer", "metrics": {"bits_per_byte": 1.2}}
    shown = sweep.results_table(TWO, [{**ROW, "name": "alpha 2"}, plain]).splitlines()
    assert shown[0].split() == ["experiment", "step", "bits_per_byte", "code_points_per_chunk", "cpu_s"]
    assert shown[2].split() == ["alpha", "2", "3", "1.250", "2.000", "1"]
    assert shown[3].split() == ["transformer", "3", "1.200", "-", "1"]
    assert shown[4].split() == ["5gram", "-", "1.500", "-", "-"]


def test_a_model_without_experiments_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["policy_gru", "--no-plot"]) == 2
    assert "expected a model with experiments, found policy_gru" in capsys.readouterr().err
    with pytest.raises(InputError):
        sweep.find_spec("nothing")


@pytest.mark.slow
def test_the_experiments_of_hnet_train(tmp_path: Path) -> None:
    few = ["--texts", "20", "--epochs", "1", "--max-bytes", "96", "--device", "cpu", "--batch", "4"]
    assert sweep.main(["hnet", "--out", str(tmp_path), *few]) == 0
    rows = json.loads((tmp_path / sweep.ROWS).read_text())
    assert len(rows) == 7
    assert all(row["metrics"]["bits_per_byte"] < 9 for row in rows)
    assert "code_points_per_chunk" not in rows[-1]["metrics"]
