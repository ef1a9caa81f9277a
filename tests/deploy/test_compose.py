"""compose.yaml and the files it mounts agree with each other."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import parse_serve

DEPLOY = Path(__file__).parents[2] / "deploy"
Yaml = dict[str, Any]


def load(path: Path) -> Yaml:
    loaded = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def compose() -> Yaml:
    return load(DEPLOY / "compose.yaml")


@pytest.fixture(scope="module")
def services(compose: Yaml) -> dict[str, Yaml]:
    found: dict[str, Yaml] = compose["services"]
    return found


def filled_in(text: str) -> str:
    """`${NAME:-default}` as compose reads it where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(services: dict[str, Yaml]) -> list[tuple[str, str, str]]:
    """(source, target, mode) of every volume line."""
    lines = (line for service in services.values() for line in service.get("volumes", []))
    split = (line.split(":") for line in lines)
    return [(parts[0], parts[1], parts[2] if len(parts) > 2 else "rw") for parts in split]


@pytest.mark.parametrize("path", [*DEPLOY.rglob("*.y*ml")], ids=lambda p: p.name)
def test_every_yaml_file_parses(path: Path) -> None:
    assert load(path)


def test_images_carry_a_tag_that_stays(services: dict[str, Yaml]) -> None:
    for service in services.values():
        name, _, tag = service["image"].partition(":")
        assert name
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), service["image"]


def test_the_servers_image_has_the_packages_version(services: dict[str, Yaml]) -> None:
    text = (DEPLOY.parent / "pyproject.toml").read_text("utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    assert services["moestro"]["image"] == f"moestro:{found[1]}"


def test_ports_are_open_on_loopback_only(services: dict[str, Yaml]) -> None:
    ports = [port for service in services.values() for port in service["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_service_has_a_health_check(services: dict[str, Yaml]) -> None:
    for service in services.values():
        assert service["healthcheck"]["test"][0] == "CMD"


def test_secrets_come_from_outside_and_are_missed(services: dict[str, Yaml]) -> None:
    key = services["moestro"]["environment"]["MOESTRO_API_KEY"]
    assert re.fullmatch(r"\$\{MOESTRO_API_KEY:\?.+\}", key), "no key: refuse to start"
    password = services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]
    assert re.fullmatch(r"\$\{GRAFANA_ADMIN_PASSWORD:\?.+\}", password)
    assert services["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_what_is_mounted_exists(compose: Yaml, services: dict[str, Yaml]) -> None:
    named = set()
    for source, target, mode in mounts(services):
        assert target.startswith("/")
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
            assert mode == "ro", source
        else:
            named.add(source)
    assert named == set(compose["volumes"])


def test_the_server_may_write_only_its_data(services: dict[str, Yaml]) -> None:
    server = services["moestro"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert [line.split(":")[1] for line in server["volumes"]] == ["/data"]


def test_the_server_is_started_as_its_command_line_wants(services: dict[str, Yaml]) -> None:
    server = services["moestro"]
    settings = parse_serve([filled_in(word) for word in server["command"]])
    assert settings.is_demo
    assert settings.host == "0.0.0.0"
    assert filled_in(server["ports"][0]) == f"127.0.0.1:8000:{settings.port}"
    # Killed only after the running requests had the time that the server gives them.
    assert int(server["stop_grace_period"].removesuffix("s")) > settings.drain_grace + 10


def test_the_demo_is_served_as_make_run_does(services: dict[str, Yaml]) -> None:
    makefile = (DEPLOY.parent / "Makefile").read_text("utf-8")
    flags = re.search(r"^DEMO_FLAGS := (.+)$", makefile, re.MULTILINE)
    assert flags is not None
    assert re.search(
        r"^run: .*\n\t.* serve demo .*\$\(DEMO_FLAGS\) \$\(ARGS\)$", makefile, re.MULTILINE
    )
    made = parse_serve(["serve", "demo", *shlex.split(flags[1])])
    composed = parse_serve([filled_in(word) for word in services["moestro"]["command"]])
    for settings in (made, composed):
        assert (settings.expert_format, settings.dense_format) == ("int8", "int8")
        assert settings.host_memory == 20 << 20


def test_with_a_gpu_the_server_is_another_image_with_a_gpu(services: dict[str, Yaml]) -> None:
    (name, server), *others = load(DEPLOY / "compose.gpu.yaml")["services"].items()
    assert (name, others) == ("moestro", [])
    assert server["image"] == f"{services['moestro']['image']}-cuda"
    targets = (services["moestro"]["build"]["target"], server["build"]["target"])
    assert targets == ("cpu", "cuda")
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    settings = parse_serve([filled_in(word) for word in server["command"]])
    assert (settings.host, settings.device, settings.expert_format) == ("0.0.0.0", "auto", "auto")


def test_prometheus_scrapes_the_server(services: dict[str, Yaml]) -> None:
    config = load(DEPLOY / "prometheus/prometheus.yml")
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    service, _, port = target.partition(":")
    assert service in services
    assert services[service]["ports"][0].endswith(f":{port}")


def test_grafana_finds_prometheus_and_the_boards(services: dict[str, Yaml]) -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = load(provisioning / "datasources/prometheus.yml")["datasources"]
    scrape = load(DEPLOY / "prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["uid"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == scrape, "$__rate_interval is made from it"

    (provider,) = load(provisioning / "dashboards/moestro.yml")["providers"]
    targets = {target: source for source, target, _ in mounts(services)}
    boards = DEPLOY / targets[provider["options"]["path"]]
    assert sorted(path.name for path in boards.iterdir()) == ["moestro.json"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert (boards / Path(home).name).is_file()
