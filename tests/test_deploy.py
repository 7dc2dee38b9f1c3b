"""What deploy/ says of ports, probes and arguments is what runtimes.serve has."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toys

from export.repository import drafting, publish
from runtimes import serve
from runtimes.background_server import answers
from runtimes.triton_server import TritonServer

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PORTS = {8000, 8001, 8002}


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    parts = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {part["kind"]: part for part in parts}


@pytest.fixture(scope="module")
def container(manifests: dict[str, Any]) -> Any:
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_ports_are_those_of_serve(manifests: dict[str, Any], container: Any) -> None:
    assert {port["containerPort"] for port in container["ports"]} == PORTS
    assert {port["port"] for port in manifests["Service"]["spec"]["ports"]} == PORTS
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == names
    exposed = re.search(r"^EXPOSE (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed
    assert {int(port) for port in exposed[1].split()} == PORTS
    (target,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert target["targets"] == ["triton:8002"]


def test_compose_opens_its_ports_to_this_host_only() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    published = [port for service in services.values() for port in service["ports"]]
    assert {int(port.split(":")[1]) for port in published} >= PORTS
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_arguments_are_serves(container: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = re.search(r"^ENTRYPOINT \[(.*)\]$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert entry
    program, option, module, *arguments = re.findall(r'"([^"]*)"', entry[1])
    assert (program, option, module) == ("python3", "-m", "runtimes.serve")
    arguments[arguments.index("/models")] = str(tmp_path)
    assert serve.main([*arguments, *container["args"]]) == 2
    assert "expected models in" in capsys.readouterr().err  # the arguments were right, the folder is empty


def test_what_the_image_copies_is_there() -> None:
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("deployed") / "model_repository"
    with drafting(repository) as draft:
        publish(draft, toys.make(draft, toys.DOUBLING), repository)
    with TritonServer(repository, poll_s=1, strict=False) as server:
        yield server


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
@toys.needs_server()[1]
@pytest.mark.slow
def test_a_real_server_answers_the_probes(running: TritonServer, container: Any, probe: str) -> None:
    assert container[probe]["httpGet"]["port"] == "http"
    assert answers(running.http_url, container[probe]["httpGet"]["path"])
    assert not answers(running.http_url, "/v2/health/nonsense")


@toys.needs_server()[1]
@pytest.mark.slow
def test_a_real_server_answers_prometheus(running: TritonServer, manifests: dict[str, Any]) -> None:
    annotations = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert answers(running.metrics_url, annotations["prometheus.io/path"])
