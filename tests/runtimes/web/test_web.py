"""The web page's server: what it answers, what it refuses in one line, and that no path leads out of its folder."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import EngineError
from runtimes.search.collection import Collection
from runtimes.web import server as web
from runtimes.web.__main__ import main
from runtimes.web.library import Library
from runtimes.web.server import Server
from tests.small_collections import PAPERS, serving, unit_rows, write_collection, write_statements


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection that is whole, one that is damaged, unfinished, a pickle, statements without vectors, strangers."""
    folder = tmp_path_factory.mktemp("collections")
    write_collection(folder / "whole & sound")
    write_collection(folder / "damaged")
    metadata = folder / "damaged/metadata.jsonl"
    metadata.write_text(metadata.read_text().partition("\n")[2])
    shutil.copytree(folder / "whole & sound", folder / "unfinished")
    (folder / "unfinished/info.json").rename(folder / "unfinished/unfinished.json")
    (folder / "old").mkdir()
    (folder / "old/embeddings.pt").write_bytes(b"pickle")
    (folder / "stranger").mkdir()
    write_statements(folder / "fresh.jsonl")
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, folder / "no repository") as server:
        yield server


def ask(server: Server, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
    """Status and JSON; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **more.get("headers", {})}
    connection.request(more.get("method", "GET" if body is None else "POST"), path, data, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


WHOLE = "/api/collections/whole%20%26%20sound"


def test_every_collection_is_listed_with_its_state(server: Server) -> None:
    found = {entry["name"]: entry for entry in ask(server, "/api/collections")[1]["collections"]}
    assert {name: entry["state"] for name, entry in found.items()} == {
        "whole & sound": "ready", "damaged": "broken", "unfinished": "broken", "old": "broken", "fresh": "uncomputed",
    }  # fmt: skip
    assert (found["whole & sound"]["rows"], found["whole & sound"]["papers"]) == (7, 3)
    assert "expected 7 lines, one for each row, found 6" in found["damaged"]["reason"]
    assert "pickle" in found["old"]["reason"]


def test_papers_are_browsed_and_filtered_by_words_of_their_title(server: Server) -> None:
    status, answer = ask(server, f"{WHOLE}/papers")
    assert (status, answer["total"]) == (200, 3)
    assert [paper["title"] for paper in answer["papers"]] == list(PAPERS)
    assert [paper["count"] for paper in answer["papers"]] == [3, 2, 2]
    found = ask(server, f"{WHOLE}/papers?filter=IDEALS+rin")[1]
    assert [paper["paper"] for paper in found["papers"]] == [0]
    assert ask(server, f"{WHOLE}/papers?start=2")[1]["papers"][0]["title"] == "Long"
    assert [s["text"] for s in ask(server, f"{WHOLE}/papers/1")[1]["statements"]] == PAPERS["\\'Etale maps"]


@pytest.mark.parametrize("others", [0, 1])
def test_neighbours_are_the_closest_rows_without_the_row_itself(others: int, server: Server) -> None:
    answer = ask(server, f"{WHOLE}/neighbours/1?others={others}&k=3")[1]
    vectors = unit_rows(7)
    order = np.argsort(-(vectors @ vectors[1]))
    allowed = order[order > 2] if others else order[order != 1]
    assert [hit["row"] for hit in answer["hits"]] == allowed[:3].tolist()
    assert answer["hits"][0]["score"] == pytest.approx(float(vectors[allowed[0]] @ vectors[1]), abs=2e-3)
    assert answer["statement"]["title"] == "Rings & ideals"


def test_a_collection_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    write_collection(tmp_path / "a")
    with serving(tmp_path, tmp_path) as server:
        assert ask(server, "/api/collections/a")[1]["state"] == "ready"
        (tmp_path / "a/info.json").unlink()
        assert ask(server, "/api/collections/a")[1]["state"] == "broken"
        shutil.rmtree(tmp_path / "a")
        assert ask(server, "/api/collections/a")[0] == 404
        write_collection(tmp_path / "a", vectors=np.roll(unit_rows(7), 1, axis=1))
        assert ask(server, "/api/collections/a")[1]["state"] == "ready"


def test_nobody_waits_for_a_collection_or_a_model_that_another_request_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("slow", "quick"):
        write_collection(tmp_path / name)
    began, goes_on = threading.Event(), threading.Event()
    honest = Collection.open

    def slow(folder: Path) -> Collection:
        if folder.name == "slow":
            began.set()
            assert goes_on.wait(20)
        return honest(folder)

    def open_embedder() -> Any:
        began.set()
        assert goes_on.wait(20)
        raise EngineError("no model")

    monkeypatch.setattr(Collection, "open", slow)
    with Library(tmp_path, open_embedder) as library, ThreadPoolExecutor(2) as pool:
        for act in (lambda: library.describe("slow")["state"], lambda: library.search("quick", "a ring", 1)):
            began.clear()
            goes_on.clear()
            waiting = pool.submit(act)
            assert began.wait(20)
            assert library.describe("quick")["state"] == "ready"
            assert len(library.neighbours("quick", 0, 2, False)) == 2
            goes_on.set()
            assert waiting.exception(20) is not None or waiting.result() == "ready"


@pytest.mark.parametrize(
    ("names", "host", "status"),
    [
        ((), "anything.example", 200),
        (("search.example",), "Search.Example:80", 200),
        (("search.example",), "127.0.0.1", 200),
        (("search.example",), "evil.example", 400),
    ],
)
def test_on_all_addresses_the_names_that_were_given_are_answered(
    tmp_path: Path, names: tuple[str, ...], host: str, status: int
) -> None:
    write_collection(tmp_path / "one")
    with serving(tmp_path, tmp_path / "none", host="0.0.0.0", names=names) as server:
        assert ask(server, "/api/collections", headers={"Host": host})[0] == status


def test_what_may_not_be_looked_at_spoils_nothing_else(tmp_path: Path) -> None:
    for name in ("whole", "damaged"):
        write_collection(tmp_path / name)
    (tmp_path / "damaged/metadata.jsonl").unlink()
    for name in ("damaged/metadata.jsonl", "stranger", "stranger.jsonl"):
        (tmp_path / name).symlink_to("x" * 300)  # a name that no file can have: looking at it is an error
    with serving(tmp_path, tmp_path / ("x" * 300)) as server:
        found = ask(server, "/api/collections")[1]["collections"]
        assert [(entry["name"], entry["state"]) for entry in found] == [("damaged", "broken"), ("whole", "ready")]
        status, answer = ask(server, "/api/collections/whole/search", {"text": "a ring"})
        assert (status, "File name too long" in answer["error"]) == (409, True)


LONE = b'{"text": "\\ud800"}'


@pytest.mark.parametrize(("path", "body", "headers", "status", "says"), [
    (f"{WHOLE}/search", {"text": ""}, {}, 400, "not empty"),
    (f"{WHOLE}/search", {"text": " \n"}, {}, 400, "not empty"),
    (f"{WHOLE}/search", {"text": 3}, {}, 400, "expected a text"),
    (f"{WHOLE}/search", [], {}, 400, "expected a text"),
    (f"{WHOLE}/search", LONE, {}, 400, "half a surrogate"),
    (f"{WHOLE}/search", b"\xff\xfe", {}, 400, "expected JSON in UTF-8"),
    (f"{WHOLE}/search", b"{", {}, 400, "expected JSON in UTF-8"),
    (f"{WHOLE}/search", b"[" * 100_000, {}, 400, "expected JSON in UTF-8"),
    (f"{WHOLE}/search", b" " * (1 << 20) + b"1", {}, 413, "at most 1048576 bytes"),
    (f"{WHOLE}/search", {"text": "a", "k": "many"}, {}, 400, "expected k from 0 to 200"),
    (f"{WHOLE}/search", {"text": "a"}, {"Content-Type": "text/plain"}, 400, "expected application/json"),
    (f"{WHOLE}/search", {"text": "a"}, {"Content-Length": "-1"}, 400, "expected Content-Length"),
    (f"{WHOLE}/search", {"text": "a"}, {"Content-Length": "1" + "0" * 17}, 413, "at most"),
    (f"{WHOLE}/search", {"text": "a" * 100_000}, {}, 400, "expected a published model that embeds texts"),
    ("/api/collections/damaged/search", {"text": "a"}, {}, 409, "found 6"),
    ("/api/collections/damaged/papers", None, {}, 409, "found 6"),
    ("/api/collections/old/papers", None, {}, 400, "pickle"),
    ("/api/collections/fresh/papers", None, {}, 400, "compute them first"),
    ("/api/collections/damaged/compute", {}, {}, 400, "found a collection"),
    ("/api/collections/none/papers", None, {}, 404, "found 'none'"),
    ("/api/collections/%ff/papers", None, {}, 400, "in UTF-8"),
    ("/api/collections/stranger", None, {}, 404, "found 'stranger'"),
    (f"{WHOLE}/papers/3", None, {}, 404, "from 0 to 2"),
    (f"{WHOLE}/neighbours/7", None, {}, 404, "from 0 to 6"),
    (f"{WHOLE}/neighbours/-1", None, {}, 404, "expected a page"),
    (f"{WHOLE}/papers?start=x", None, {}, 400, "expected start"),
    ("/api/collections", None, {"Host": "evil.example"}, 400, "expected a host"),
    ("/api", None, {}, 404, "expected a page"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    path: str, body: Any, headers: dict[str, str], status: int, says: str, server: Server
) -> None:
    found, answer = ask(server, path, body, headers=headers)
    assert (found, list(answer)) == (status, ["error"])
    assert says in answer["error"]
    assert "\n" not in answer["error"]
    assert ask(server, f"{WHOLE}/papers")[0] == 200  # and the server goes on


@pytest.mark.parametrize("path", [
    "/../secret.txt", "/secret.txt", "/%2e%2e/server.py", "/../server.py", "//etc/passwd", "/katex/../../server.py",
    "/api/collections/..", "/api/collections/../secret.txt", "/api/collections/%2e%2e%2fsecret.txt/papers",
    "/api/collections/..%2F/papers", "/api/collections/stranger%2F../papers", "/katex/README.md",
])  # fmt: skip
def test_no_path_leads_out_of_the_pages_and_collections(path: str, server: Server) -> None:
    status, answer = ask(server, path)
    assert (status, list(answer)) == (404, ["error"])


def test_every_answer_forbids_what_the_page_does_not_need(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)
    for method in ("GET", "HEAD"):
        for path in ("/", "/app.js", "/katex/katex.min.css", "/api/collections", "/nowhere"):
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in response.headers["Content-Security-Policy"]
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert bool(body) == (method == "GET")
    connection.close()


def test_the_pages_have_no_inline_script_and_name_no_other_host() -> None:
    page = (web.ASSETS / "index.html").read_text()
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page))
    assert re.findall(r"\son[a-z]+=|\sstyle=|<style", page) == []
    for path in web.ASSETS.glob("*.*"):
        assert [url for url in re.findall(r"https?://[^\s\"']+", path.read_text()) if "www.w3.org" not in url] == []
        assert "innerHTML" not in path.read_text()


def test_a_client_that_goes_away_or_says_nothing_harms_nobody(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    for printed in (
        b"",
        b"POST /api/collections HTTP/1.1\r\n",
        b"\xff\xfe\x00",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        with socket.create_connection(server.server_address[:2]) as connection:  # type: ignore[arg-type]
            connection.sendall(printed)
    assert ask(server, "/api/collections")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def wait_for(server: Server, name: str) -> dict[str, Any]:
    """What is said of a collection once nothing is computed any more."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found: dict[str, Any] = ask(server, f"/api/collections/{name}")[1]
        if found["state"] != "computing":
            return found
        time.sleep(0.05)
    raise AssertionError("still computing")


def test_a_computation_that_failed_says_why_and_may_be_tried_again(server: Server) -> None:
    for _ in range(2):
        assert ask(server, "/api/collections/fresh/compute", {})[0] == 200
        found = wait_for(server, "fresh")
        assert found["state"] == "uncomputed"
        assert "expected a published model that embeds texts" in found["reason"]


def test_the_command_prints_its_address_and_ends_when_interrupted(folder: Path) -> None:
    command = [sys.executable, "-m", "runtimes.web", "--collections", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    assert process.stdout
    address = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
    assert address
    connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=120)
    connection.request("GET", "/api/collections")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


@pytest.mark.parametrize(("arguments", "says"), [
    (["--collections", "nowhere"], "expected a folder"),
    (["--collections", ".", "--port", "99999"], "expected a free port"),
    (["--collections", ".", "--host", "no.such.host.invalid"], "expected a free port"),
])  # fmt: skip
def test_a_wrong_command_line_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_statements_without_vectors_get_them_and_are_searched(statements_repository: Path, tmp_path: Path) -> None:
    write_statements(tmp_path / "fresh.jsonl")
    (tmp_path / "wrong.jsonl").write_text('{"arxiv_id": ""}\n')
    with serving(tmp_path, statements_repository) as server:
        for name in ("fresh", "wrong"):
            ask(server, f"/api/collections/{name}/compute", {})
        assert wait_for(server, "fresh") == {"name": "fresh", "state": "ready", "rows": 7, "papers": 3}
        assert "wrong.jsonl:1" in wait_for(server, "wrong")["reason"]
        text = PAPERS["\\'Etale maps"][0]
        hits = ask(server, "/api/collections/fresh/search", {"text": text, "k": 3})[1]["hits"]
        assert (hits[0]["text"], hits[0]["score"], len(hits)) == (text, pytest.approx(1, abs=2e-3), 3)
        assert ask(server, "/api/collections/fresh/search", {"text": "x" * 100_000})[0] == 200


@pytest.mark.slow
def test_a_collection_of_another_model_is_not_searched_by_text(statements_repository: Path, tmp_path: Path) -> None:
    write_collection(tmp_path / "other", model="f" * 64)
    with serving(tmp_path, statements_repository) as server:
        status, answer = ask(server, "/api/collections/other/search", {"text": "a ring"})
        assert (status, "vectors of another model" in answer["error"]) == (409, True)
        assert ask(server, "/api/collections/other/neighbours/0")[0] == 200  # which needs no model
