"""The documentation site builds without a warning, and its own parts do what they are for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from slipway.command import MODULES
from tests.docs.blocks import ROOT

pytest.importorskip("mkdocs")


def load(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES, FIELDS = load("site_pages"), load("field_lists")
PATHS = {"README.md": "index.md", "docs/data.md": "data.md", "docs/models/hnet.md": "models/hnet.md"}


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("README.md", "[a](docs/models/hnet.md#top)", "[a](models/hnet.md#top)"),
        ("docs/models/hnet.md", "[a](../../README.md)", "[a](../index.md)"),
        ("docs/data.md", "[a](models/hnet.md)", "[a](models/hnet.md)"),
        ("README.md", "[text](LICENSE)", "text"),
        ("README.md", "[a](https://example.org)", "[a](https://example.org)"),
        ("README.md", "```\n[a](docs/data.md)\n```", "```\n[a](docs/data.md)\n```"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(source: str, text: str, expected: str) -> None:
    assert PAGES.with_site_links(text, source, PATHS) == expected


def test_aligned_fields_become_a_list_and_other_lines_stay() -> None:
    text = "A thing.\n\nname   its name\n       in full\nsize   bytes\n\nIt is  here."
    expected = "A thing.\n\n\n- `name`: its name\n  in full\n- `size`: bytes\n\nIt is  here."
    assert FIELDS.with_lists(text) == expected


@pytest.mark.slow
def test_the_page_of_commands_has_every_subcommand_and_every_other_command() -> None:
    page = PAGES.commands_page()
    for name in MODULES:
        assert f"\n## slipway {name}\n\n```text\nusage: slipway {name} " in page
    assert "\n### python -m training.sample_data\n" in page


@pytest.mark.slow
def test_the_site_builds_strict(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in api for name in ("slipway.load", "slipway.Model.predict", "training.spec.ModelSpec"))
