"""A repository that was published before version 0.2 is served by this version.

Its generating step is a copy of the program of then (before_0_2/write.py), which imports modules by their old names.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from runtimes.errors import SlipwayError
from runtimes.pipelines.hnet.generation import EXAMPLE
from runtimes.triton.client import CLIENTS, TritonClient
from runtimes.triton.server import TritonServer
from tests import toys
from tests.exported import Exports

OLD_STEP = Path(__file__).parent / "before_0_2" / "write.py"
NEW, OLD = "hnet_generate", "hnet_before"

pytestmark = toys.needs_server()


@pytest.fixture(scope="module")
def repository(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published model that generates, and a copy of it with the step of version 0.1."""
    repository = exports.onnx(tmp_path_factory.mktemp("before") / "model_repository", "hnet", "hnet_step")
    shutil.copytree(repository / NEW, repository / OLD)
    config = repository / OLD / "config.pbtxt"
    config.write_text(config.read_text().replace(NEW, OLD))
    (step,) = (repository / OLD).glob("*/model.py")
    shutil.copy(OLD_STEP, step)
    return repository


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[TritonClient]:
    with (
        TritonServer(repository, models=[NEW, OLD]) as server,
        closing(CLIENTS["grpc"](server.grpc_url, 60)) as client,
    ):
        yield client


def answers(client: TritonClient, model: str, request: object) -> list[bytes]:
    data = {"request": np.array([json.dumps(request).encode()], np.object_)}
    return [response["answer"].item() for response in client.stream(model, data)]


@pytest.mark.parametrize("changes", [{}, {"text": "", "max_bytes": 33, "seed": 5}, {"temperature": 0, "top_k": 3}])
def test_the_step_of_the_version_before_answers_with_the_same_bytes(
    client: TritonClient, changes: dict[str, object]
) -> None:
    request = {**EXAMPLE, **changes}
    before, now = (answers(client, model, request) for model in (OLD, NEW))
    assert before == now
    assert json.loads(now[-1])["finish_reason"] in ("length", "stop")


def test_a_wrong_request_is_refused_by_both_with_the_same_text(client: TritonClient) -> None:
    texts = []
    for model in (OLD, NEW):
        with pytest.raises(SlipwayError, match="max_bytes: expected a whole number") as caught:
            answers(client, model, {**EXAMPLE, "max_bytes": 0})
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_the_old_step_needs_the_old_names() -> None:
    """Each name that the copy imports is one of `runtimes/previous_names`, or the test above shows nothing."""
    text = OLD_STEP.read_text()
    assert all(f"from runtimes.{name} import" in text for name in ("base", "waiting_line", "writing"))
