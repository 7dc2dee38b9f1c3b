"""Show a results file as a page or as Markdown: python -m runtimes.report results.json --html results.html

The page is one file that loads nothing. Markdown is for the summary of a CI run.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from runtimes.bench.plots import Series, bars, curves, strips
from runtimes.bench.results import (
    COLUMNS,
    Row,
    counted_samples,
    load_results,
    name_of,
    sizes_text,
    table_of,
    times_eager,
)
from runtimes.errors import InputError
from runtimes.host.cli import command, existing_folder, parser

STYLE = Path(__file__).parent / "bench" / "report.css"
SHOWN = [name for name in COLUMNS if name != "model"]  # each model has its own table
TEXTS = ("scenario", "sizes", "engine", "device", "note")
READING = (
    "Milliseconds are of one call. A percentile is of the pooled raw samples of the steady windows; a dash means too "
    "few samples (p50 needs 7, p90 44, p95 90, p99 459). x eager: the speed as a multiple of torch eager in float32, "
    "measured in runs interleaved with it. Agreement: the lowest parity check of decisions against the original, from "
    "the export. Device ms: the median time on the GPU between events around a call, where the engine has a stream. "
    "Unstable: the last three windows differed by more than 10 %; under arrivals, the engine did not keep up, or "
    "its speed changed by more than 10 %; the figures then are of all windows. Refused: requests that a busy server "
    "refused; they are in no percentile and not in the goodput."
)


@command
def main(argv: list[str] | None = None) -> int:
    """Write the page, the Markdown or both; without either, print the Markdown."""
    arguments = _parser().parse_args(argv)
    results = load_results(arguments.results)
    if not results["rows"]:
        raise InputError(
            f"{arguments.results}: expected rows, found none; measure: python -m runtimes.bench --out FILE"
        )
    for path in filter(None, (arguments.html, arguments.markdown)):
        existing_folder(path.absolute().parent, "room for the report")
    if arguments.html:
        arguments.html.write_text(page(results), encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results), encoding="utf-8")
    if not arguments.html and not arguments.markdown:
        print(markdown(results), end="")
    return 0


def page(results: Mapping[str, Any]) -> str:
    """The page: environment, legend, then a section for each model."""
    by_model = models_of(results["rows"])
    links = "".join(f'<a href="#{escape(model)}">{escape(model)}</a>' for model in by_model)
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in environment_lines(results["environment"]))
    sections = "".join(section(model, rows) for model, rows in by_model.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Benchmark</title>'
        f"<style>{STYLE.read_text()}</style></head><body><h1>Benchmark</h1>"
        f'<p class="faint">{len(results["rows"])} rows of {len(by_model)} models</p><nav>{links}</nav>'
        f'<dl>{facts}</dl><h3>How to read it</h3><p class="faint">{escape(READING)}</p>{sections}</body></html>\n'
    )


def section(model: str, rows: Sequence[Row]) -> str:
    """One model: its plots, and a table of all its rows."""
    parts = [f'<h2 id="{escape(model)}">{escape(model)}</h2>']
    parts += [figure_of(*each) for each in figures(rows) if each[2]]
    header, cells = table_of(rows, SHOWN)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in cells)
    parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>')
    return "".join(parts)


def figures(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """(title, caption, SVG) of each plot; the SVG is empty where no row has its data."""
    measured = [row for row in rows if "failed" not in row]
    single = _where(measured, "single-stream")
    for sizes in dict.fromkeys(map(sizes_text, single)):
        at = [row for row in single if sizes_text(row) == sizes]
        yield f"Latency, one request at a time, {sizes}", "ms; the line is the median", latency_strips(at)
    yield (
        "Throughput against latency, concurrent requests",
        "The number is the requests in flight; the ring marks "
        "the knee, past which latency grows faster than throughput.",
        sweep(measured, "concurrency"),
    )
    yield "Throughput against latency, by batch", "The number is the batch size.", sweep(measured, "offline")
    served = [(_named(row), row["engine"], counted_samples(row), row["p50_s"]) for row in _where(measured, "server")]
    caption = "ms, Poisson arrivals, from the intended time of sending"
    yield "Latency under arrivals", caption, strips([_in_ms(line) for line in served], "ms")
    request = _first_sizes(single)
    memory = [(name_of(row), row["engine"], row["memory_bytes"] / 1e6) for row in request]
    yield "Memory", "MB, peak resident memory of all processes of the engine", bars(memory, "MB")
    gpu = [(name_of(row), row["engine"], row["gpu_memory_bytes"] / 1e6) for row in request if row["gpu_memory_bytes"]]
    yield "Memory on the GPU", "MB, peak", bars(gpu, "MB")
    caption = "Agreement with the decisions of the original model (1: all are equal) against speed. Top right is best."
    yield "Speed against accuracy", caption, speed_against_accuracy(rows, request)


def latency_strips(rows: Sequence[Row]) -> str:
    """The counted latencies of every row, in ms, a strip for each engine."""
    return strips([_in_ms((name_of(row), row["engine"], counted_samples(row), row["p50_s"])) for row in rows], "ms")


def sweep(rows: Sequence[Row], scenario: str) -> str:
    """Rows a second against the median latency, a line for each engine, in the order of the sweep."""
    lines: dict[str, list[Row]] = {}
    for row in _where(rows, scenario):
        if row["p50_s"]:
            lines.setdefault(name_of(row), []).append(row)
    series = [
        Series(
            name=name,
            kind=own[0]["engine"],
            points=[(r["rows_per_s"], r["p50_s"] * 1e3, str(r.get("lanes") or r["sizes"]["batch"])) for r in own],
            ringed=next((i for i, row in enumerate(own) if row.get("knee")), None),
        )
        for name, own in lines.items()
    ]
    return curves(series, "rows a second", "ms, median")


def speed_against_accuracy(rows: Sequence[Row], request: Sequence[Row]) -> str:
    """A point for each engine: its speed as a multiple of torch eager's, and its lowest agreement of decisions."""
    known = [(row, times_eager(rows, row)) for row in request if row["agreement"] is not None]
    series = [
        Series(name=name_of(row), kind=row["engine"], points=[(times, row["agreement"], "")])
        for row, times in known
        if times
    ]
    return curves(series, "speed, multiple of torch eager", "agreement", linear_y=True, height=300)


def figure_of(title: str, caption: str, drawn: str) -> str:
    return f"<h3>{escape(title)}</h3><figure><figcaption>{escape(caption)}</figcaption>{drawn}</figure>"


def markdown(results: Mapping[str, Any]) -> str:
    """The environment, the same tables, and the legend, in Markdown."""
    lines = ["# Benchmark", "", *(f"* {key}: {value}" for key, value in environment_lines(results["environment"])), ""]
    for model, rows in models_of(results["rows"]).items():
        header, cells = table_of(rows, SHOWN)
        lines += [f"## {model}", "", f"| {' | '.join(header)} |"]
        lines.append("".join("|---" if name in TEXTS else "|--:" for name in header) + "|")
        lines += [f"| {' | '.join(map(_cell, line))} |" for line in cells]
        lines.append("")
    return "\n".join([*lines, READING, ""])


def environment_lines(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each known fact about the machine and the versions."""
    for name, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {each}" for key, each in value.items() if each is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, "", False):
            yield name.replace("_", " "), "yes" if value is True else str(value)


def models_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by model, in file order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def _where(rows: Sequence[Row], scenario: str) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario]


def _first_sizes(rows: Sequence[Row]) -> list[Row]:
    """The rows at the sizes of a request: those of the first row."""
    return [row for row in rows if row["sizes"] == rows[0]["sizes"]]


def _named(row: Row) -> str:
    return f"{name_of(row)} {row['rate_per_s']:.0f}/s"


def _in_ms(line: tuple[str, str, Sequence[float], float | None]) -> tuple[str, str, Sequence[float], float | None]:
    name, kind, samples, median = line
    return name, kind, [sample * 1e3 for sample in samples], None if median is None else median * 1e3


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _parser() -> Any:
    result = parser(
        "runtimes.report",
        "Shows a results file as one page that loads nothing, or as Markdown.",
        "results.json --html results.html",
        "results.json --markdown summary.md",
    )
    result.add_argument("results", type=Path, help="a file of runtimes.bench")
    result.add_argument("--html", type=Path, help="write the page to this file (default: none)")
    result.add_argument(
        "--markdown", type=Path, help="write Markdown to this file (default: print it where --html is not given)"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
