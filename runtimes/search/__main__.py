"""Find the statements of a collection that are closest to a text: python -m runtimes.search COLLECTION --text TEXT"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.host.cli import command, json_argument, parser
from runtimes.search.collection import Collection
from runtimes.search.embedder import embedder_arguments, open_embedder
from runtimes.search.exact import top_k
from runtimes.search.index import Index

TEXT_CHARACTERS = 70  # of a statement, in the table


@command
def main(argv: list[str] | None = None) -> int:
    """Print the closest statements with their cosines, as a table or as JSON."""
    arguments = _parser().parse_args(argv)
    collection = Collection.open(arguments.collection)
    with open_embedder(arguments) as embedder:
        embedder.refuse_another(arguments.collection, collection.info.model)
        queries = embedder.vectors([arguments.text])
    if arguments.approximate:
        rows, scores = Index(collection).top_k(queries, arguments.k, threads=arguments.threads)
    else:
        rows, scores = top_k(collection.embeddings, queries, arguments.k, threads=arguments.threads)
    hits = [
        {"row": int(row), "score": round(float(score), 6), **asdict(collection.entry(int(row)))}
        for row, score in zip(rows[0], scores[0], strict=True)
    ]
    if arguments.json:
        print(json.dumps({"text": arguments.text, "hits": hits}, ensure_ascii=False))
        return 0
    for hit in hits:
        text = " ".join(hit["text"].split())
        print(f"{hit['score']:.3f}  {hit['row']:>7}  {hit['arxiv_id']}  {hit['type']}  {text[:TEXT_CHARACTERS]}")
    return 0


def _parser() -> Any:
    result = parser(
        "runtimes.search",
        __doc__.partition(":")[0] + ".",
        "collections/toy --text 'every affine scheme is quasi-compact'",
        "collections/toy --text 'a Noetherian ring' --k 100 --json",
    )
    result.add_argument("collection", type=Path, metavar="COLLECTION", help="folder of the collection")
    result.add_argument("--text", required=True, help="text to search for, with or without LaTeX")
    result.add_argument("--k", type=int, default=10, help="number of statements (default: %(default)s)")
    result.add_argument("--approximate", action="store_true", help="use the index of runtimes.search.index")
    json_argument(result)
    embedder_arguments(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
