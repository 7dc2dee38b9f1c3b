"""Thousands of nearly valid requests to real ensembles: each is answered or declined, and the server keeps running.

SLIPWAY_FUZZ sets how many to each ensemble, SLIPWAY_REPOSITORY a folder with more ensembles than these two (make fuzz).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes import soak
from runtimes.errors import InputError
from runtimes.triton.client import CLIENTS, TritonClient
from runtimes.triton.server import TritonServer
from tests import toys
from tests.exported import Exports
from tests.wrong_requests import VALUES, nearly

pytestmark = toys.needs_server()
REQUESTS = int(os.environ.get("SLIPWAY_FUZZ", "150"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> Path:
    if given_ := os.environ.get("SLIPWAY_REPOSITORY"):
        return Path(given_)
    return exports.onnx(tmp_path_factory.mktemp("fuzzed") / "model_repository", "policy_gru", "statements")


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[TritonClient]:
    client = CLIENTS["grpc"](server.grpc_url, 60)
    yield client
    client.close()


def as_bytes(request: Any) -> bytes:
    """The request as a client might send it: half a surrogate pair becomes bytes that are not UTF-8."""
    return json.dumps(request, ensure_ascii=False).encode(errors="surrogatepass")


def test_nearly_right_requests_are_answered_or_declined(
    server: TritonServer, repository: Path, client: TritonClient
) -> None:
    """No error of the server's own, no crash; the right request is answered as before in the end."""
    examples = soak.examples(repository, [])
    checked = {model: soak.CheckedRequest(client, model, request) for model, request in examples.items()}
    seen = {soak.CORRECT: 0, soak.REJECTED: 0}

    def fuzz(model: str, example: Any) -> None:
        @settings(max_examples=REQUESTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(nearly(example) | VALUES | st.binary(max_size=50))
        def one(request: Any) -> None:
            sent = request if isinstance(request, bytes) else as_bytes(request)
            try:
                json.loads(checked[model].answer(sent))
                seen[soak.CORRECT] += 1
            except InputError:
                seen[soak.REJECTED] += 1

        one()

    for model, request in examples.items():
        fuzz(model, json.loads(request))
    assert server.running
    for each in checked.values():
        assert soak.alike(json.loads(each.answer(each.request)), each.expected)
    print(f"{sum(seen.values())} requests to {len(examples)} ensembles: {seen}")
    assert seen[soak.REJECTED] > REQUESTS
