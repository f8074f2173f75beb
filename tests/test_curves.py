"""figures/curves.py: what the committed curves hold, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def curves(*flags) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "figures" / "curves.py", *map(str, flags)],
                          capture_output=True, text=True)


def test_a_point_is_the_mean_over_a_window_and_thinning_twice_changes_nothing(tmp_path):
    rows = [{"stage": stage, "step": step, "accuracy": step / 100, "format": 1.0,
             "confidence": None if step < 21 else 0.5, "loss_answer": 1.0, "loss_confidence": 2.0}
            for stage in ("base", "opd") for step in range(40)]
    rows[:40] = [{"stage": "base", "step": step, "loss": 1.0} for step in range(40)]
    whole, once, twice = (tmp_path / name for name in ("whole.jsonl", "once.jsonl", "twice.jsonl"))
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curves(whole, "--thin", once).returncode == curves(once, "--thin", twice).returncode == 0
    assert once.read_text() == twice.read_text()
    points = [json.loads(line) for line in once.read_text().splitlines()]
    assert [(p["stage"], p["step"], p["accuracy"], p["confidence"]) for p in points] == [
        ("opd", 0, pytest.approx(0.095), None), ("opd", 20, pytest.approx(0.295), 0.5)]


def test_the_committed_curves_are_those_of_five_seeds(tmp_path):
    pytest.importorskip("matplotlib")
    files = sorted((ROOT / "experiments" / "curves").glob("*.jsonl"))
    assert [file.stem for file in files] == [f"seed{seed}" for seed in range(5)]
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(row["stage"], row["step"]) for row in rows] == [
            (name, step) for name in ("opd", "caopd", "caopd-direct") for step in range(0, 600, 20)]
        last = {row["stage"]: row for row in rows if row["step"] == 580}
        assert last["opd"]["confidence"] > 0.99
        assert abs(last["caopd"]["confidence"] - last["caopd"]["accuracy"]) < 0.06
    assert curves(*files, "--out", tmp_path / "curves.png").returncode == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("text, words", [
    ("{", "not a metrics.jsonl"), ('{"stage": "opd", "step": 1}\n', "not a metrics.jsonl"),
    ("", "no method in these files"), (None, "cannot be read")])
def test_other_files_are_refused_in_a_sentence(tmp_path, text, words):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    answer = curves(path)
    assert answer.returncode == 2 and words in answer.stderr and answer.stderr.count("\n") == 1
