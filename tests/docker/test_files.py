"""What no container can show here: the files are linted, and hold what docker/README.md promises of them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import agnews_lora
from agnews_lora.cli import parser
from tests.docker.compose import DOCKER, interpolate, load, merged

BIN = Path(sys.executable).parent
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
README = (DOCKER / "README.md").read_text(encoding="utf-8")
COMPOSE = load("compose.yaml")
MERGED = merged()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

each_service = pytest.mark.parametrize("name", SERVICES)


def test_the_dockerfile_is_linted() -> None:
    lint(BIN / "hadolint", DOCKER / "Dockerfile")


def test_the_compose_files_keep_to_the_specification_alone_and_merged(tmp_path: Path) -> None:
    YAML(typ="safe").dump(MERGED, tmp_path / "merged.yaml")
    files = (DOCKER / "compose.yaml", DOCKER / "cluster.yaml", tmp_path / "merged.yaml")
    lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


@each_service
def test_images_are_pinned(name: str) -> None:
    image, tag = SERVICES[name]["image"].split(":")
    if build := SERVICES[name].get("build"):
        assert tag == agnews_lora.__version__
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
        assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, re.M)
    else:
        assert (image, bool(re.fullmatch(r"\d+\.\d+-bookworm", tag))) == ("postgres", True)


def test_stages_are_built_on_a_pinned_image() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M)
    assert len(stages) == len(re.findall(r"^FROM", DOCKERFILE, re.M))
    known = set()
    for image, stage in stages:
        assert image in known or re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", image), image
        known.add(stage)


def test_what_is_installed_into_an_image_is_pinned() -> None:
    installs = re.findall(r"pip install (.+?)(?: \\)?$", DOCKERFILE, re.M)
    assert len(installs) == 6
    for install in installs:
        packages = [part for part in shlex.split(install) if not part.startswith("-")]
        exact = all(re.fullmatch(r"[\w.-]+==[\w.]+", package) for package in packages)
        # The wheel is this project's, built in a stage.
        wheel = packages == ["/wheels/*.whl"] and "--no-deps" in install
        assert "-c /constraints.txt" in install or "--require-hashes" in install or exact or wheel, install


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    sources = {
        source
        for arguments in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for source in arguments.split()[:-1]
    }
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == sources
    assert all((DOCKER.parent / source).exists() for source in sources)


@each_service
def test_services_have_a_health_check_or_a_reason(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check.get("test") or (check == {"disable": True} and SERVICES[name]["x-no-healthcheck"])


@each_service
def test_services_wait_for_what_they_need(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        reached = "service_healthy" if "test" in SERVICES[needed]["healthcheck"] else "service_started"
        assert how == {"condition": "service_completed_successfully" if needed == "tables" else reached}


@each_service
def test_services_have_few_rights(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    if target := service.get("build", {}).get("target"):
        stage = re.search(rf" AS {target}\n(.+?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S)
        assert stage and re.findall(r"^USER (.+)$", stage[1], re.M) == [service["user"]]


def test_only_the_uis_are_published_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"mlflow": ["127.0.0.1:5000:5000"], "dashboard": ["127.0.0.1:8080:8080"]}


def test_a_cluster_reaches_postgres_and_mlflow_on_its_address() -> None:
    services = interpolate(MERGED, {name: f"<{name}>" for name in variables("compose.yaml", "cluster.yaml")})[
        "services"
    ]
    added = {
        name: service["ports"][len(SERVICES[name].get("ports", [])) :]
        for name, service in services.items()
        if service.get("ports", []) != SERVICES[name].get("ports", [])
    }
    assert added == {"postgres": ["<CLUSTER_ADDRESS>:5432:5432"], "mlflow": ["<CLUSTER_ADDRESS>:5000:5000"]}


def test_a_cluster_changes_of_the_mlflow_command_only_hosts_and_accounts() -> None:
    *alone, hosts = SERVICES["mlflow"]["command"]
    command = interpolate(MERGED["services"]["mlflow"]["command"], {"CLUSTER_HOSTS": "head:5000"})
    assert command == [*alone, f"{hosts},head:5000", "--app-name=basic-auth"]


@pytest.mark.parametrize("name", ["sweep", "worker"])
def test_what_trains_reserves_the_gpu(name: str) -> None:
    devices = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in devices] == [["gpu"]]
    assert not {"ports", "container_name"} & SERVICES[name].keys()  # either would keep it from being scaled


def test_no_file_carries_a_password() -> None:
    for file in DOCKER.iterdir():
        if file.name == ".env":
            continue
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"://[^\s/@]*:[^\s/@]*@", text), f"{file.name}: a URL with a password"
        # In YAML and ini files a password is asked of the environment, without a default.
        for name, value in re.findall(r"^\s*(\w*(?:password|secret)\w*)\s*[:=](.*)$", text, re.M | re.I):
            assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value.strip()) or file.suffix == ".sql", f"{file.name}: {name}"


def test_the_readme_is_short_and_names_every_variable_that_is_asked_for() -> None:
    assert variables("compose.yaml") == {"POSTGRES_PASSWORD"}
    assert all(f"`{name}=" in README for name in variables("compose.yaml", "cluster.yaml"))
    assert len([line for line in README.splitlines() if line]) <= 10
    assert "/docker/.env" in (DOCKER.parent / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_command_line_takes_the_commands() -> None:
    worker = re.search(r"^    agnews-lora (worker .+)$", README, re.M)
    assert worker
    for arguments in (SERVICES["sweep"]["command"], SERVICES["worker"]["command"], shlex.split(worker[1])):
        options = parser().parse_args(arguments)
        assert (options.sweep, options.storage[:20]) == ("agnews", "postgresql://agnews@")


@pytest.mark.parametrize("services", [SERVICES, MERGED["services"]], ids=["compose", "merged"])
def test_mlflow_has_the_options_that_its_command_uses(services: dict[str, dict[str, Any]]) -> None:
    from mlflow.cli import server

    known = {option for parameter in server.params for option in (*parameter.opts, *parameter.secondary_opts)}
    program, command, *options = services["mlflow"]["command"]
    assert (program, command, server.name) == ("mlflow", "server", "server")
    assert {option.partition("=")[0] for option in options} <= known


def lint(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def variables(*names: str) -> set[str]:
    return {found for name in names for found in re.findall(r"\$\{(\w+)", (DOCKER / name).read_text(encoding="utf-8"))}
