"""The code on the pages about adding a model and a target works as printed: its files in a copy of the project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks_of

COPIED = ("slipway", "runtimes", "training", "export")


def project_with_the_files_of(page: Path, folder: Path) -> dict[str, str]:
    """A copy of the packages with the files that the page prints; variables with which commands use it."""
    for package in COPIED:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks_of(page):
        if block.title:
            path = folder / block.title
            assert not path.exists(), f"{block.place}: {block.title} is there already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    commands = folder / "bin"
    commands.mkdir()
    for name, command in (("slipway", f"{sys.executable} -m slipway"), ("python", sys.executable)):
        (commands / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def run_blocks(page: Path, folder: Path, environment: dict[str, str]) -> str:
    """What the page's commands print, run in order in the folder; an assertion fails for one that fails."""
    printed = ""
    for block in blocks_of(page):
        if block.language != "bash" or block.reason:
            continue
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{block.place}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
        printed += ended.stdout
    return printed


@pytest.mark.slow
def test_the_model_of_the_page_is_trained_exported_and_answers(tmp_path: Path) -> None:
    page = ROOT / "docs" / "adding_a_model.md"
    printed = run_blocks(page, tmp_path, project_with_the_files_of(page, tmp_path))
    assert '"kind": "walking"' in printed
    assert (tmp_path / "model_repository" / "tempo_onnx" / "1" / "model.onnx").is_file()


@pytest.mark.slow
def test_the_target_of_the_page_converts_and_its_engine_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "adding_a_target.md"
    printed = run_blocks(page, tmp_path, project_with_the_files_of(page, tmp_path))
    assert "hallucination_scorer" in printed
    assert list(tmp_path.glob(".model_repository/**/hallucination_scorer_onnx_reference/1/model.onnx"))
