"""What deploy/ says of ports, probes and arguments is what runtimes.serve has."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.triton.repository import drafting, publish
from runtimes import serve
from runtimes.host.background_server import answers
from runtimes.triton.server import HTTP_BYTES, TritonServer
from tests import toys

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PORTS = {8000, 8001, 8002}
BEHIND = [
    f"--{service}-port={port}" for service, port in zip(("http", "grpc", "metrics"), range(18000, 18003), strict=True)
]


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    parts = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {part["kind"]: part for part in parts}


@pytest.fixture(scope="module")
def containers(manifests: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each for each in manifests["Deployment"]["spec"]["template"]["spec"]["containers"]}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return found


def of_image(instruction: str) -> list[str]:
    """The words of an instruction of the Dockerfile that has them in JSON."""
    found = re.search(rf"^{instruction} (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    words: list[str] = json.loads(found[1])
    return words


def test_the_ports_are_those_of_serve(manifests: dict[str, Any], containers: dict[str, Any]) -> None:
    assert {port["containerPort"] for port in containers["proxy"]["ports"]} == PORTS
    assert {port["port"] for port in manifests["Service"]["spec"]["ports"]} == PORTS
    names = {port["name"] for port in containers["proxy"]["ports"]}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == names
    exposed = re.search(r"^EXPOSE (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed
    assert {int(port) for port in exposed[1].split()} == PORTS
    (target,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert target["targets"] == ["proxy:8002"]


def test_the_proxy_listens_where_clients_ask_and_asks_where_the_server_listens(
    containers: dict[str, Any], services: dict[str, Any]
) -> None:
    proxy = (DEPLOY / "nginx.conf").read_text()
    assert {int(port) for port in re.findall(r"listen (\d+)", proxy)} == PORTS
    assert {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", proxy)} == {port + 10_000 for port in PORTS}
    assert containers["triton"]["args"][1:] == BEHIND
    assert "=".join(services["triton"]["command"]).replace("=--", " --").split() == BEHIND


def test_the_server_has_the_limit_of_the_proxy() -> None:
    (mib,) = re.findall(r"client_max_body_size (\d+)m;", (DEPLOY / "nginx.conf").read_text())
    assert int(mib) << 20 == HTTP_BYTES


def test_compose_opens_its_ports_to_this_host_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert {int(port.split(":")[1]) for port in published} >= PORTS
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_only_the_proxy_reaches_the_server(services: dict[str, Any], containers: dict[str, Any]) -> None:
    assert "ports" not in services["triton"]
    assert services["triton"]["network_mode"] == "service:proxy"
    given = [*of_image("ENTRYPOINT"), *services["triton"]["command"], *containers["triton"]["args"]]
    assert not any(word.startswith("--host") for word in given)  # so loopback, in the network of the proxy


def test_the_repository_belongs_to_who_serves_it(services: dict[str, Any], manifests: dict[str, Any]) -> None:
    assert services["triton"]["user"].startswith("${SLIPWAY_USER:?")  # no start without one
    pod = manifests["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert pod["runAsUser"] == pod["fsGroup"] == 10001


def test_a_pod_waits_for_its_models_and_does_not_wait_for_another_pod(manifests: dict[str, Any]) -> None:
    deployment = manifests["Deployment"]["spec"]
    assert deployment["strategy"] == {"type": "Recreate"}
    (waiting,) = deployment["template"]["spec"]["initContainers"]
    assert "/models/complete" in waiting["command"][-1]
    assert waiting["volumeMounts"] == [{"name": "models", "mountPath": "/models"}]


@pytest.mark.parametrize("where", ["alone", "compose", "Kubernetes"])
def test_the_arguments_are_serves(
    services: dict[str, Any],
    containers: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    added = {
        "alone": of_image("CMD"),
        "compose": services["triton"]["command"],
        "Kubernetes": containers["triton"]["args"],
    }
    program, option, module, *arguments = [*of_image("ENTRYPOINT"), *added[where]]
    assert (program, option, module) == ("python3", "-m", "runtimes.serve")
    inside = [re.sub(r"/models(/model_repository)?$", str(tmp_path), argument) for argument in arguments]
    assert serve.main(inside) == 2
    assert f"expected models in {tmp_path}" in capsys.readouterr().err  # the arguments were right, the folder is empty


def test_what_kustomize_puts_together_is_there() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    assert all((DEPLOY / name).is_file() for name in [*kustomization["resources"], *generated["files"]])
    assert f"configMap: {{name: {generated['name']}}}" in (DEPLOY / "kubernetes.yaml").read_text()


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
def test_a_real_server_answers_the_probes(running: TritonServer, containers: dict[str, Any], probe: str) -> None:
    asked = containers["triton"][probe]["httpGet"]
    assert asked["port"] == 8000
    assert answers(running.http_url, asked["path"].replace("policy_gru", "doubling_onnx"))
    assert not answers(running.http_url, "/v2/health/nonsense")


@toys.needs_server()[1]
@pytest.mark.slow
def test_a_real_server_answers_prometheus(running: TritonServer, manifests: dict[str, Any]) -> None:
    annotations = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert answers(running.metrics_url, annotations["prometheus.io/path"])


@toys.needs_server()[1]
@pytest.mark.slow
def test_a_server_without_a_model_is_neither_healthy_nor_ready(
    running: TritonServer, containers: dict[str, Any], tmp_path: Path
) -> None:
    ready = containers["triton"]["readinessProbe"]["httpGet"]["path"]
    (tmp_path / "policy_gru" / "1").mkdir(parents=True)
    with TritonServer(tmp_path, strict=False) as broken:
        assert answers(broken.http_url, "/v2/health/ready")
        assert not answers(broken.http_url, ready)
        assert health(broken) != 0
    assert health(running) == 0


def health(server: TritonServer) -> int:
    """Exit status of the image's health check, asked of this server."""
    _, option, program = (word.replace("127.0.0.1:8000", server.http_url) for word in of_image("  CMD"))
    return subprocess.run([sys.executable, option, program], stderr=subprocess.DEVNULL, check=False).returncode
