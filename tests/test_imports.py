"""The directions of the design: who may import whom, who may know which library, and what must start without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import agnews_lora

PACKAGE = Path(agnews_lora.__file__).parent
MODULES = {
    ".".join(["agnews_lora", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A room may import the rooms of the lines above its own, and itself. Rooms of one line do not know each other.
LINES = [
    {"agnews_lora", "errors"},
    {"paths"},
    {"hub"},
    {"data", "adapters"},
    {"training"},
    {"config"},
    {"search", "tracking"},
    {"serving"},
    {"reporting"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LINE = {room: number for number, line in enumerate(LINES) for room in line}

# Who may import a library; a module stands for itself, a room for all of its modules.
HOMES = {
    "pydantic": {"config"},
    "pydantic_core": {"config"},
    "ruamel": {"config"},
    "datasets": {
        "hub",
        "data.files",
        "training.hf_trainer",
    },  # `evaluate` describes the features of a metric in its terms
    "evaluate": {"training"},
    "optuna": {"search", "commands"},  # `commands` joins the rooms: it hands a study and a client from one to another
    "ray": {"search.ray_cluster"},
    "mlflow": {"tracking", "serving", "commands"},
    "fastapi": {"serving.server"},
    "fastapi_offline": {"serving.server"},
    "prometheus_client": {"serving.server"},
    "starlette": {"serving.server"},
    "uvicorn": {"serving.server"},
    "matplotlib": {"reporting"},
    "jinja2": {"reporting", "tracking"},
    "typst": {"reporting"},
    "rich": {"reporting", "commands"},
}

STARTS_LIGHT = [
    "agnews_lora.cli",
    "agnews_lora.commands.inspect",
    "agnews_lora.adapters.spec",
    "agnews_lora.adapters.budget",
    "agnews_lora.adapters.base_models",
    "agnews_lora.training.interface",
    "agnews_lora.data.sources",
    *(module for module in MODULES if module.startswith("agnews_lora.config.")),
]
HEAVY = ["torch", "transformers", "peft", "mlflow", "optuna", "pandas", "matplotlib", "datasets", "evaluate", "scipy"]


def room(module: str) -> str:
    return module.removeprefix("agnews_lora.").split(".")[0]


def imported(path: Path, module: str) -> Iterator[str]:
    """Absolute names of everything that a module imports, at its top and inside its functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                parent = ".".join(package.split(".")[: len(package.split(".")) + 1 - level]) if level else ""
                origin = ".".join(part for part in (parent, source) if part)
                yield from (f"{origin}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def own_imports(module: str) -> set[str]:
    return {name for name in imported(MODULES[module], module) if name.split(".")[0] == "agnews_lora"}


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} <= set(LINE)


# The package itself names what users import from it, and imports it when it is asked for.
@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"agnews_lora"}))
def test_imports_point_one_way(module: str) -> None:
    own = room(module)
    known = {other for other in LINE if LINE[other] < LINE[own]} | {own}
    reached = {room(name) if room(name) in LINE else "agnews_lora" for name in own_imports(module)}
    assert reached <= known


@pytest.mark.parametrize("module", MODULES)
def test_each_library_has_its_home(module: str) -> None:
    name = module.removeprefix("agnews_lora.")
    libraries = {library.split(".")[0] for library in imported(MODULES[module], module)}
    strangers = {
        library
        for library in libraries & set(HOMES)
        if not any(f"{name}.".startswith(f"{home}.") for home in HOMES[library])
    }
    assert not strangers


def test_the_reading_of_imports_sees_all_forms(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\n"
        "def h():\n    import i\n    importlib.import_module('j.k')\n"
    )
    assert set(imported(source, "agnews_lora.room.module")) == {
        "a.b",
        "c.d",
        "agnews_lora.room.e",
        "agnews_lora.f.g",
        "i",
        "j.k",
    }


@pytest.mark.parametrize("module", STARTS_LIGHT)
def test_what_must_start_at_once_imports_nothing_heavy(module: str) -> None:
    command = f"import sys, {module}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("arguments", [["--help"], ["budget", "--bad"], ["sweep", "missing"], ["doctor", "--quick"]])
def test_what_must_answer_at_once_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import contextlib, sys; from agnews_lora.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments})\n"
        f"sys.exit(bool(set({HEAVY}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
