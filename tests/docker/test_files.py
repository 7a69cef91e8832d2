"""What no container can show here: the files are linted, and hold what docker/README.md promises of them."""

import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
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
OVERLAYS = ("cluster.yaml", "postgres.yaml")
MERGED = {name: merged(name) for name in OVERLAYS}
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"] | {
    "postgres": MERGED["postgres.yaml"]["services"]["postgres"]
}

each_service = pytest.mark.parametrize("name", SERVICES)


def test_the_dockerfile_is_linted() -> None:
    lint(BIN / "hadolint", DOCKER / "Dockerfile")


def test_the_compose_files_keep_to_the_specification_alone_and_merged(tmp_path: Path) -> None:
    files = [DOCKER / "compose.yaml", *(DOCKER / name for name in OVERLAYS)]
    for name, content in MERGED.items():
        files.append(tmp_path / name)
        YAML(typ="safe").dump(content, files[-1])
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
        assert how == {"condition": reached}


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


def test_workers_reserve_the_gpu_and_can_be_scaled() -> None:
    worker = SERVICES["worker"]
    devices = worker["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in devices] == [["gpu"]]
    assert not {"ports", "container_name"} & worker.keys()


@pytest.mark.parametrize("name", ["sweep", "worker"])
@pytest.mark.parametrize("services", [COMPOSE["services"], *(each["services"] for each in MERGED.values())])
def test_ray_asks_for_the_token_that_is_a_secret(name: str, services: dict[str, dict[str, Any]]) -> None:
    service = services[name]
    assert service["secrets"] == ["ray_token"] and service["shm_size"] == "1gb"
    path = service["environment"]["RAY_AUTH_TOKEN_PATH"]
    assert (service["environment"]["RAY_AUTH_MODE"], path) == ("token", "/run/secrets/ray_token")
    assert COMPOSE["secrets"] == {"ray_token": {"file": "./ray-token"}}


def test_no_file_carries_a_password() -> None:
    for file in DOCKER.iterdir():
        if file.name in (".env", "ray-token"):
            continue
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"://[^\s/@]*:[^\s/@]*@", text), f"{file.name}: a URL with a password"
        # In YAML and ini files a password is asked of the environment, without a default.
        for name, value in re.findall(r"^\s*(\w*(?:password|secret)\w*)\s*[:=](.*)$", text, re.M | re.I):
            asked = re.fullmatch(r"\$\{\w+:\?[^}]+\}|\[ray_token\]|", value.strip())
            assert asked or file.suffix == ".sql", f"{file.name}: {name}"


def test_the_readme_names_every_variable_that_is_asked_for() -> None:
    assert variables("compose.yaml") == set()
    assert all(f"`{name}=" in README for name in variables(*OVERLAYS))
    ignored = (DOCKER.parent / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"/docker/.env", "/docker/ray-token"} <= set(ignored)


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_the_programs_have_the_options_that_the_commands_use(overlay: str | None) -> None:
    from mlflow.cli import server

    services = MERGED[overlay]["services"] if overlay else SERVICES
    services = interpolate(services, {"CLUSTER_ADDRESS": "192.0.2.1", "POSTGRES_PASSWORD": "x"})
    program, command, *options = services["mlflow"]["command"]
    assert (program, command) == ("mlflow", "server")
    known = {option for parameter in server.params for option in (*parameter.opts, *parameter.secondary_opts)}
    require_options(known, options)

    head, _, sweep = services["sweep"]["command"][0].partition(" && exec ")
    require_options(ray_start(), shlex.split(head)[2:])
    require_options(ray_start(), services["worker"]["command"])
    arguments = parser().parse_args(shlex.split(sweep)[1:])
    assert (arguments.sweep, arguments.address) == ("agnews", "auto")


def test_the_job_for_kubernetes_runs_the_sweep_of_this_version_with_a_token() -> None:
    spec = load("rayjob.yaml")["spec"]
    program, *words = shlex.split(spec["entrypoint"])
    assert (program, parser().parse_args(words).address) == ("agnews-lora", "auto")
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    pins = (DOCKER.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={cluster['rayVersion']}" in pins
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        require_options(ray_start(), [f"--{name}" for name in group["rayStartParams"]])
        [container] = group["template"]["spec"]["containers"]
        assert container["image"] == f"agnews-lora:{agnews_lora.__version__}"


@cache
def ray_start() -> set[str]:
    """The options of `ray start`, asked in another process: Ray reads its settings when it is imported."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install '.[cluster]'")
    done = subprocess.run([BIN / "ray", "start", "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[\w-]+", done.stdout))


def require_options(known: set[str], options: list[str]) -> None:
    assert {option.partition("=")[0] for option in options} <= known


def lint(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def variables(*names: str) -> set[str]:
    return {found for name in names for found in re.findall(r"\$\{(\w+)", (DOCKER / name).read_text(encoding="utf-8"))}
