"""The web page's server: fixed pages, a JSON interface over the library, one-line errors, bounded requests.

Pages are read once, when the server starts; names in a request are only looked up, so that none reaches the disk.
"""

import json
import re
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from runtimes.errors import EngineError, InputError, SlipwayError, one_line
from runtimes.web.library import Library, NotFound, matching, statement

ASSETS = Path(__file__).parent / "assets"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_BYTES = 1 << 20
UNREAD_BYTES = 1 << 24  # up to here, a body that is too large is taken in, for most clients read no answer before
PATIENCE_S = 30  # to wait for a silent client
K_MAX = 200
PAGE_PAPERS = 200

Answer = dict[str, Any]


class TooLarge(InputError):
    """The body of a request is larger than any that makes sense."""


# Errors of a request, in order; an error of a collection or of the model is no error of the request.
STATUSES = {
    NotFound: HTTPStatus.NOT_FOUND,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    InputError: HTTPStatus.BAD_REQUEST,
    SlipwayError: HTTPStatus.CONFLICT,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """`names` are the variable parts of the path; `query` and `body` those of the request."""

    names: tuple[str, ...]
    query: dict[str, str]
    body: Any = None

    def number(self, name: str, default: int, largest: int) -> int:
        """A whole number from 0 to `largest` in the query."""
        return _number(self.query.get(name, str(default)), name, largest)

    def text(self, name: str) -> str:
        """A text in the body."""
        value = self.body.get(name) if isinstance(self.body, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"expected a text '{name}' that is not empty, found {ascii(value)[:40]}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"expected Unicode text in '{name}', found half a surrogate pair") from error
        return value


def collections(library: Library, request: Request) -> Answer:
    """The list of `Library.describe_all`."""
    return {"collections": library.describe_all()}


def collection(library: Library, request: Request) -> Answer:
    """One entry of that list."""
    return library.describe(request.names[0])


def papers(library: Library, request: Request) -> Answer:
    """One page of the papers whose title or id holds the words of `filter`, beginning with number `start` of them."""
    found = library.open(request.names[0]).papers
    chosen = matching(found, request.query.get("filter", ""))
    start = request.number("start", 0, len(found))
    rows = [
        {"paper": i, "arxiv_id": found[i].arxiv_id, "title": found[i].title, "count": found[i].stop - found[i].start}
        for i in chosen[start : start + PAGE_PAPERS]
    ]
    return {"total": len(chosen), "start": start, "papers": rows}


def paper(library: Library, request: Request) -> Answer:
    """A paper with all its statements; `NotFound` for a number beyond the last."""
    opened = library.open(request.names[0])
    number = int(request.names[1])
    if number >= len(opened.papers):
        raise NotFound(f"expected a paper from 0 to {len(opened.papers) - 1}, found {number}")
    found = opened.papers[number]
    statements = [statement(opened, row) for row in range(found.start, found.stop)]
    return {"paper": number, "arxiv_id": found.arxiv_id, "title": found.title, "statements": statements}


def neighbours(library: Library, request: Request) -> Answer:
    """A statement and the `k` nearest to it, with `others=1` of other papers only; `NotFound` for no such row."""
    name, row = request.names[0], int(request.names[1])
    opened = library.open(name)
    if row >= len(opened.source):
        raise NotFound(f"expected a row from 0 to {len(opened.source) - 1}, found {row}")
    k, others = max(1, request.number("k", 20, K_MAX)), request.number("others", 0, 1) == 1
    return {"statement": statement(opened, row), "hits": library.neighbours(name, row, k, others)}


def search(library: Library, request: Request) -> Answer:
    """The `k` statements nearest to a text."""
    k = max(1, _number(request.body.get("k", 20) if isinstance(request.body, dict) else 20, "k", K_MAX))
    return {"hits": library.search(request.names[0], request.text("text"), k)}


def compute(library: Library, request: Request) -> Answer:
    """The entry of a file whose vectors are computed from now on."""
    library.compute(request.names[0])
    return library.describe(request.names[0])


NAME, NUMBER = "([^/]+)", "([0-9]{1,15})"
ROUTES: dict[tuple[str, str], Callable[[Library, Request], Answer]] = {
    ("GET", "/api/collections"): collections,
    ("GET", f"/api/collections/{NAME}"): collection,
    ("GET", f"/api/collections/{NAME}/papers"): papers,
    ("GET", f"/api/collections/{NAME}/papers/{NUMBER}"): paper,
    ("GET", f"/api/collections/{NAME}/neighbours/{NUMBER}"): neighbours,
    ("POST", f"/api/collections/{NAME}/search"): search,
    ("POST", f"/api/collections/{NAME}/compute"): compute,
}


class Server(ThreadingHTTPServer):
    """Serves the page for one library on `host`; port 0 takes a free one. `url` is its address.

    Only requests for this machine, for `host` or for one of `names` are answered; on an address that others reach and
    without names, requests for any host are.
    """

    daemon_threads = True

    def __init__(self, library: Library, host: str, port: int, names: Sequence[str] = ()) -> None:
        self.library = library
        self.pages = read_pages()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.hosts = {host, *LOOPBACK, *(name.lower() for name in names)} if names or host in LOOPBACK else None
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"expected a free port on {host}, found {port}: {one_line(error)}") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}/" if ":" in str(host) else f"http://{host!s}:{port}/"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Slipway", ""
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are private."""

    def _answer(self, method: str) -> None:
        try:
            self._refuse_other_sites()
            path, _, query = self.path.partition("?")
            if method == "GET" and path in self.server.pages:
                kind, data = self.server.pages[path]
                self._send(HTTPStatus.OK, kind, data)
            else:
                self._send_json(HTTPStatus.OK, self._ask(method, path, query))
        except SlipwayError as error:
            self.close_connection = method == "POST"  # whose body may be left unread
            status = next(status for kind, status in STATUSES.items() if isinstance(error, kind))
            self._send_json(status, {"error": one_line(error, 500)})

    def _ask(self, method: str, path: str, query: str) -> Answer:
        for (verb, pattern), route in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and verb == method:
                names = tuple(_decoded(name) for name in match.groups())
                parameters = {name: values[-1] for name, values in parse_qs(query).items()}
                body = self._body() if method == "POST" else None
                try:
                    return route(self.server.library, Request(names=names, query=parameters, body=body))
                except OSError as error:  # of a disk, not of the client: it is reported to the client
                    raise EngineError(one_line(error)) from error
        raise NotFound(f"expected a page of this server, found {method} {path[:80]}")

    def _body(self) -> Any:
        """The JSON value in the body; never more than `BODY_BYTES` are read."""
        if self.headers.get_content_type() != "application/json":  # which a page of another site cannot send
            raise InputError(f"expected application/json, found {self.headers.get_content_type()[:80]}")
        size = _number(self.headers.get("Content-Length", ""), "Content-Length", 1 << 62)
        if size > BODY_BYTES:
            for _ in range(size // BODY_BYTES if size <= UNREAD_BYTES else 0):
                self.rfile.read(BODY_BYTES)
            raise TooLarge(f"expected a body of at most {BODY_BYTES} bytes, found {size}")
        try:
            return json.loads(self.rfile.read(size).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"expected JSON in UTF-8, found {one_line(error, 120)}") from error

    def _refuse_other_sites(self) -> None:
        """A name of another site that leads to this machine would let that site's pages read ours."""
        host = re.sub(r":\d*$", "", self.headers.get("Host", "")).strip("[]").lower()
        if self.server.hosts is not None and host not in self.server.hosts:
            raise InputError(f"expected a host of {', '.join(sorted(self.server.hosts))}; found '{host[:80]}'")

    def _send_json(self, status: HTTPStatus, answer: Answer) -> None:
        self._send(status, "application/json", json.dumps(answer).encode())

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **HEADERS}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def read_pages() -> dict[str, tuple[str, bytes]]:
    """Content type and bytes by path."""
    files = [path for path in ASSETS.rglob("*") if path.suffix in TYPES]
    pages = {f"/{path.relative_to(ASSETS).as_posix()}": (TYPES[path.suffix], path.read_bytes()) for path in files}
    return {"/": pages["/index.html"], **pages}


def _number(value: Any, name: str, largest: int) -> int:
    if not re.fullmatch("[0-9]{1,18}", str(value)) or int(value) > largest:
        raise InputError(f"expected {name} from 0 to {largest}, found {ascii(value)[:40]}")
    return int(value)


def _decoded(name: str) -> str:
    try:
        return unquote(name, errors="strict")
    except UnicodeDecodeError as error:
        raise InputError(f"expected a name in UTF-8, found {name[:80]}") from error
