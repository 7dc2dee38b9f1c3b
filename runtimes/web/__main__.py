"""Browse and search collections of statements in a web browser: python -m runtimes.web --collections DIR"""

import sys
from pathlib import Path
from typing import Any

from runtimes.host.cli import command, existing_folder, parser
from runtimes.search.embedder import embedder_arguments, open_embedder
from runtimes.web.library import Library
from runtimes.web.server import Server


@command
def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; the first line printed is the page's address."""
    arguments = _parser().parse_args(argv)
    folder = existing_folder(arguments.collections, "collections, or statements as .jsonl")
    with Library(folder, lambda: open_embedder(arguments), arguments.threads) as library:
        server = Server(library, arguments.host, arguments.port, arguments.allow_host)
        print(server.url, flush=True)
        try:
            server.serve_forever()
        finally:
            server.server_close()
    return 0


def _parser() -> Any:
    result = parser(
        "runtimes.web",
        __doc__.partition(":")[0] + ".",
        "--collections collections",
        "--collections collections --host 0.0.0.0 --port 8010 --allow-host search.example.org",
    )
    result.add_argument("--collections", type=Path, default=Path("collections"), metavar="DIR",
                        help="folder of collections (default: %(default)s)")  # fmt: skip
    result.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    result.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which others reach this machine; requests for any other are then refused",
    )
    result.add_argument("--port", type=int, default=0, help="port to listen on (default: %(default)s, any free one)")
    embedder_arguments(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
