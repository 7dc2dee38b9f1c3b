"""Collections of a few statements, and a server of the web page over them, for the tests of search and of the page."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from runtimes.search.collection import Entry, Info
from runtimes.search.embedder import Embedder
from runtimes.search.writer import Writer
from runtimes.web.library import Library
from runtimes.web.server import Server

MODEL = "0" * 64
PAPERS = {
    "Rings & ideals": [
        "Let $R$ be a Noetherian ring. Then every ideal of $R$ is finitely generated.",
        "If $a < b$ and $b > c$ then <b>nothing</b> follows & <script>window.hacked = 1</script>.",
        "We have \\begin{enumerate} \\item $\\Spec(R)$ is quasi-compact, and \\item $D_\\QCoh(X)$ is not {\\it small}. "
        "\\end{enumerate}",
    ],
    "\\'Etale maps": [
        "An \\'etale morphism is flat: $$ \\mathcal{O}_{X, x} \\to \\mathcal{O}_{Y, y} $$ is flat for all $x$.",
        "Unclosed $x^2 and \\unknown{macro} with \\begin{itemize} \\item no end",
    ],
    "Long": ["$x$ " * 25_000, "Short after long."],
}


def entries() -> list[Entry]:
    return [
        Entry(paper=number, arxiv_id=f"math/{number}", title=title, type="lemma", text=text)
        for number, (title, texts) in enumerate(PAPERS.items())
        for text in texts
    ]


def unit_rows(rows: int, width: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_collection(folder: Path, *, vectors: np.ndarray | None = None, model: str = MODEL) -> np.ndarray:
    """A collection of PAPERS in the folder, float16; its rows as they were given."""
    vectors = unit_rows(len(entries())) if vectors is None else vectors
    info = Info(
        rows=len(vectors), width=vectors.shape[1], dtype="float16", model=model,
        base={"source": "tiny", "sha256": MODEL}, pooling="last", max_tokens=256, size="toy", data=MODEL,
    )  # fmt: skip
    writer = Writer.reserve(folder, info, entries())
    writer.write(0, vectors)
    writer.finish()
    return vectors


def write_statements(path: Path, papers: Sequence[str] = tuple(PAPERS)) -> None:
    """The same papers as a file of statements without vectors."""
    rows = [
        {"arxiv_id": f"math/{i}", "title": title, "statements": [{"type": "lemma", "text": t} for t in PAPERS[title]]}
        for i, title in enumerate(papers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def serving(
    collections: Path, repository: Path, host: str = "127.0.0.1", names: Sequence[str] = ()
) -> Iterator[Server]:
    """A server in this process, stopped at the end."""
    with Library(collections, lambda: Embedder(repository)) as library:
        server = Server(library, host, 0, names)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
