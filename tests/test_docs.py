"""The documents are right: their commands exist and run, their links lead somewhere, their tables are the models'."""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from ruamel.yaml import YAML

from agnews_lora.adapters.base_models import KNOWN
from agnews_lora.adapters.budget import feasible_ranks, require_within_budget
from agnews_lora.cli import parser
from agnews_lora.config import experiment, sweep
from tests.documents import PAGES, ROOT, Block, anchors, blocks, links, prose, tables, targets

FENCES = ("sh", "sh run")
GUIDE = ROOT / "docs"
MODELS: dict[str, type[BaseModel]] = {
    "Keys of a sweep": sweep.Sweep,
    "`space`": sweep.Space,
    "`sampler`": sweep.Sampler,
    "`pruner`": sweep.Pruner,
    "`confirmation`": sweep.Confirmation,
    "Keys of an experiment": experiment.Experiment,
    "`data`, `source: newswire`": experiment.NewswireData,
    "`data`, `source: files`": experiment.FilesData,
    "`data`, `source: hub`": experiment.HubData,
    "`splits`": experiment.HubSplits,
    "`adapter`": experiment.Adapter,
    "`training`": experiment.Training,
}


def every(*fences: str) -> list[Block]:
    """The blocks of all pages whose fence is one of these."""
    return [block for page in PAGES for block in blocks(page) if block.fence in fences]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_with_commands_is_fenced_as_one(page: Path) -> None:
    for block in blocks(page):
        if block.is_of_commands:
            assert block.fence in FENCES, f"{block.place}: ```{block.fence} is none of {', '.join(FENCES)}"
        else:
            found = re.findall(r"^\s*(?:\$ )?((?:agnews-lora|make) [a-z].*)$", block.text, flags=re.MULTILINE)
            assert not found, f"{block.place}: the fence of {found} must be one of {', '.join(FENCES)}"


@pytest.mark.parametrize("block", every(*FENCES), ids=lambda block: block.place)
def test_every_command_is_one_that_there_is(block: Block) -> None:
    for program, *words in block.commands():
        match Path(program).name, words:
            case "agnews-lora", _:
                assert parser().parse_args(words).command
            case "make", [target, *variables]:
                assert target in targets(), f"{block.place}: make {target}"
                for variable in variables:
                    name = variable.partition("=")[0]
                    assert re.search(rf"\$\((if \$\()?{name}\)", targets()[target]), f"{block.place}: {variable}"
            case "python" | "python3", ["-m", module, *_] if module not in ("venv", "pip"):
                assert importlib.util.find_spec(module), f"{block.place}: {module}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_in_a_sentence_is_one_that_there_is(page: Path) -> None:
    [commands] = [action.choices for action in parser()._actions if action.choices]
    known = {"agnews-lora": set(commands) | {"COMMAND"}, "make": set(targets())}
    for program, word in re.findall(r"`(agnews-lora|make) ([\w-]+)", prose(page)):
        assert word in known[program], f"{named(page)}: {program} {word}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_target_has_a_line_of_help_and_a_recipe_that_can_be_run() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    helped = set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))
    assert helped == set(targets())
    asked = {"setup", "sweep", "train", "ui", "report", "promote", "predict", "serve", "test", "proof", "lint", "clean"}
    assert helped >= asked
    for target in helped:
        variables = ["SWEEP=agnews", "EXPERIMENT=embedded", "TEXT=Oil prices rose.", "MERGED=1", "PORT=5002"]
        done = subprocess.run(
            ["make", "--dry-run", target, *variables], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for line in re.findall(r"^\S*bin/agnews-lora (.+)$", done.stdout, flags=re.MULTILINE):
            assert parser().parse_args(shlex.split(line)).command


@pytest.fixture(scope="module")
def printed(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Block, str]:
    """Output of the blocks that run, all in one finished project. Its sweep `small` stands for `embedded`."""
    folder = Path(shutil.copytree(finished_once, tmp_path_factory.mktemp("guide"), dirs_exist_ok=True))
    for kind in ("experiments", "sweeps"):
        shutil.copy(ROOT / kind / "agnews.yaml", folder / kind)
    found = {}
    with contextlib.chdir(folder):
        for block in every("sh run"):
            output = io.StringIO()
            for program, *words in block.commands():
                assert program == "agnews-lora", f"{block.place}: only agnews-lora is run"
                options = parser().parse_args(words)
                for name in ("sweep", "experiment"):
                    if getattr(options, name, None) == "embedded":
                        setattr(options, name, "small")
                with contextlib.redirect_stdout(output):
                    assert options.command(options) == 0, f"{block.place}: {' '.join(words)}"
            found[block] = output.getvalue()
    return found


@pytest.mark.parametrize("block", every("sh run"), ids=lambda block: block.place)
def test_a_command_that_is_run_prints_something(block: Block, printed: dict[Block, str]) -> None:
    assert printed[block].strip()


# The answer of a stopped sweep is left out: no command of a page stops one.
SCRIPTED = [block for block in every("json") if '"INTERRUPTED"' not in block.text]


@pytest.mark.parametrize("block", SCRIPTED, ids=lambda block: block.place)
def test_what_is_printed_as_json_has_the_shape_that_is_shown(block: Block, printed: dict[Block, str]) -> None:
    shown = json.loads(block.text.replace("embedded", "small"))
    texts = [text for ran, text in printed.items() if (ran.page, ran.heading) == (block.page, block.heading)]
    assert texts, f"{block.place}: no command in this section prints it"
    text = texts[0] if isinstance(shown, list) else texts[0].splitlines()[0]
    assert same_shape(shown, json.loads(text)), f"{block.place}:\n{texts[0]}"


def same_shape(one: Any, other: Any) -> bool:
    """The same keys everywhere, and the same kinds of values; None is of any kind, and one of a list stands for all."""
    if one is None or other is None:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_shape(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return not one or not other or same_shape(one[0], other[0])
    return type(one) is type(other) or {type(one), type(other)} == {int, float}


# Links and examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in anchors(to), f"{named(page)}: {link}; there are {sorted(anchors(to))}"


def test_every_page_of_the_guide_is_in_its_index() -> None:
    assert {link for link in links(GUIDE / "README.md") if "/" not in link} == {
        page.name for page in GUIDE.glob("*.md") if page.name != "README.md"
    }


def test_every_example_is_a_file_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "sweeps"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    examples = every("yaml")
    assert examples
    for block in examples:
        name = re.match(r"# ((?:experiments|sweeps)/[\w-]+\.yaml)\n", block.text)
        assert name, f"{block.place}: the first line of an example names its file"
        Path(name[1]).write_text(block.text, encoding="utf-8")
    for path in sorted(Path("experiments").glob("*.yaml")):
        experiment.load_experiment(str(path))
    for path in sorted(Path("sweeps").glob("*.yaml")):
        read = sweep.load_sweep(str(path))
        if published := KNOWN.get(read.experiment.base):
            feasible_ranks(list(read.space.targets), list(read.space.heads), published.shape, read.budget)
            require_within_budget(read.experiment.spec, published.shape, read.budget)


@pytest.mark.parametrize("heading", MODELS)
def test_the_keys_and_defaults_are_the_models(heading: str) -> None:
    model = MODELS[heading]
    [table] = [table for table in tables(GUIDE / "writing-a-space.md") if table.heading == heading]
    assert table.columns == ["key", "type", "default", "meaning"]
    shown = {key.strip("`"): default for key, _, default, _ in table.rows}
    fields = model.model_fields
    assert sorted(shown) == sorted(fields)
    for key, default in shown.items():
        value = fields[key].get_default()
        if value is PydanticUndefined:
            assert default == "required", f"{key} has no default, but {default} is shown"
        elif isinstance(value, BaseModel) and not isinstance(value, sweep.Range):
            assert default == "below", f"{key} is a block of its own, but {default} is shown"
        else:
            plain = model.model_construct(**{key: value}).model_dump(mode="json", include={key})[key]
            assert YAML(typ="safe").load(default.strip("`")) == plain, f"{key} is {plain} by default, not {default}"


# Completeness --------------------------------------------------------------------------------------------------------


def test_every_command_and_option_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    [commands] = [action.choices for action in parser()._actions if action.choices]
    options = {
        option
        for command in commands.values()
        for action in command._actions
        if action.help != argparse.SUPPRESS
        for option in action.option_strings
        if option.startswith("--")
    }
    words = [*(f"agnews-lora {name}" for name in commands), *options]
    assert [word for word in words if not re.search(rf"{word}\b", text)] == []


def test_every_block_of_a_yaml_file_has_its_table() -> None:
    schemas = [model.model_json_schema() for model in (sweep.Sweep, experiment.Experiment)]
    models = {"Sweep", "Experiment"}.union(*(schema["$defs"] for schema in schemas))
    assert {name for name in models if not name.startswith("Range")} == {model.__name__ for model in MODELS.values()}
