"""Hooks of mkdocs: pages whose source lies outside docs/, the page of commands, and links between them.

A link in a tracked file is relative to that file, as GitHub reads it. On the site it leads to the page of its file; a
link to a file that has no page becomes plain text.
"""

import contextlib
import importlib
import io
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "deploy/README.md": "deploying.md",
}
COMMANDS_PAGE = "commands.md"
COLUMNS = "100"  # of a help text
FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
NOT_A_FILE = ("http://", "https://", "mailto:", "#")


def site_paths() -> dict[str, str]:
    """The site's path of every file that is on it, by the path in the repository."""
    docs = ROOT / "docs"
    paths = {f"docs/{name}": name for name in _names(docs) if not name.endswith(".py")}
    results = (ROOT / "benchmarks").glob("*/*")
    paths |= {name: name for name in (path.relative_to(ROOT).as_posix() for path in results) if _is_result(name)}
    return paths | {source: page for source, page in ELSEWHERE.items() if (ROOT / source).is_file()}


def with_site_links(markdown: str, source: str, paths: dict[str, str]) -> str:
    """The text of the repository's file `source` with links to pages of the site."""

    def replace(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        if link.startswith(NOT_A_FILE):
            return match[0]
        file, _, anchor = link.partition("#")
        target = paths.get(posixpath.normpath(posixpath.join(posixpath.dirname(source), file)))
        if target is None:
            return text
        relative = posixpath.relpath(target, posixpath.dirname(paths[source]) or ".")
        return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(replace, part) for i, part in enumerate(parts))


def commands_page() -> str:
    """The help text of every command: the subcommands of `slipway` by group, then the other modules."""
    if str(ROOT) not in sys.path:  # mkdocs takes back what a hook changes while it is loaded
        sys.path.insert(0, str(ROOT))
    from slipway.command import GROUPS, help_text

    sections = ["# Commands", INTRODUCTION, f"```text\n{help_text()}\n```"]
    for group in GROUPS.values():
        for name, (module, _) in group.items():
            sections.append(_section(f"slipway {name}", module))
    named = {module for group in GROUPS.values() for module, _ in group.values()}
    sections.append("## Other modules")
    sections += [_section(f"python -m {each.removesuffix('.__main__')}", each, "###") for each in other_commands(named)]
    return "\n\n".join(sections) + "\n"


INTRODUCTION = (
    "The `--help` of every command, as its parser prints it. Every subcommand of `slipway` is also a module: "
    "`slipway export` is `python -m export.all`."
)


def other_commands(named: set[str]) -> Iterator[str]:
    """The modules that are commands and that no subcommand runs."""
    for package in ("training", "export", "runtimes"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if "\n@command\n" in path.read_text(encoding="utf-8") and module not in named:
                yield module


def printed_help(command: str, module: str) -> str:
    """The text that the module's parser prints for --help under the name of the command."""
    from runtimes.host.cli import program

    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    token = program.set(command)
    try:
        with contextlib.redirect_stdout(printed):
            importlib.import_module(module).main(["--help"])
    finally:
        program.reset(token)
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return printed.getvalue().rstrip()


def _section(command: str, module: str, level: str = "##") -> str:
    return f"{level} {command}\n\n```text\n{printed_help(command, module)}\n```"


def on_files(files: Any, config: Any) -> Any:
    """Adds the files that lie outside docs/, and the page of commands."""
    from mkdocs.structure.files import File

    for source, page in site_paths().items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, COMMANDS_PAGE, content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site needs them."""
    paths = site_paths()
    source = next((source for source, path in paths.items() if path == page.file.src_uri), None)
    return with_site_links(markdown, source, paths) if source else markdown


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _is_result(name: str) -> bool:
    return name.endswith((".md", ".png")) or (name.endswith(".json") and "/matrix/" not in name)
