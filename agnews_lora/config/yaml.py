"""From a YAML file to a frozen, strict model, with every fault of the file reported at once.

Accepts YAML 1.2 with plain values only. A fault is reported as `FILE:LINE:COLUMN: KEY: MESSAGE`, with pydantic's
message, the value that was met and the nearest accepted word, above the line of the file and a caret.
"""

import os.path
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, get_args
from unicodedata import east_asian_width

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, SequenceNode

from agnews_lora.errors import ConfigError, nearest

MAX_BYTES: Final = 64 * 1024  # far above any real file, and still parsed within seconds
MAX_TEXT: Final = 4_096  # characters; Linux knows no longer path
MAX_SHOWN: Final = 100  # characters of a line of the file
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 1, 60, 60


class _PlainComposer(Composer):
    """Without aliases: through them, a few lines stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            alias = self.parser.peek_event()
            raise ComposerError(
                None, None, f"an alias (*{alias.anchor}) is not accepted; write its value out", alias.start_mark
            )
        return super().compose_node(parent, index)


class Settings(BaseModel):
    """A block of a file: frozen, no unknown keys, no conversions (a whole number is a number, though), no NaN."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Document(Settings):
    """A whole file. It is named by its file's name, never by a key."""

    _path: Path = PrivateAttr()
    _source_text: str = PrivateAttr()

    @property
    def name(self) -> str:
        """The file's name without its ending. Its studies, runs and models have this name."""
        return self._path.stem

    @property
    def source_text(self) -> str:
        """The file, word for word."""
        return self._source_text


DocumentT = TypeVar("DocumentT", bound=Document)


def load(model: type[DocumentT], path: Path) -> DocumentT:
    """Read a file into its model, whose validators find `path` in their context.

    Raises:
        ConfigError: a file that cannot be read, is not YAML, or is not valid; names all its faults.
    """
    text = _read(path)
    reader = YAML(typ="safe", pure=True)
    reader.Composer = _PlainComposer
    try:
        document = model.model_validate(reader.load(text), context={"path": path})
    except ValidationError as error:
        root = reader.compose(text)
        faults = sorted((_fault(model, root, details) for details in error.errors()), key=lambda fault: fault[0])
        heading = f"Cannot read {path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ConfigError("\n".join([heading, *(_located(path, text, *fault) for fault in faults)])) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        fault = _located(path, text, (mark.line, mark.column), reason) if mark else f"  {reason}"
        raise ConfigError(f"Cannot read {path}: not valid YAML\n{fault}") from error
    except YAMLError as error:
        raise ConfigError(f"Cannot read {path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, LookupError, ArithmeticError) as error:  # a tag, a date or an escape that does not fit its text
        reason = str(error).partition(";")[0]  # behind it, Python advises programmers
        raise ConfigError(f"Cannot read {path}: a value does not fit its YAML type ({reason})") from error
    except RecursionError as error:
        raise ConfigError(f"Cannot read {path}: nested too deep; at most three levels are used.") from error
    document._path = path
    document._source_text = text
    return document


def _read(path: Path) -> str:
    if not _NAME.fullmatch(path.stem):
        raise ConfigError(
            f"Cannot read {path}: runs and models are named after the file, so its name must start with a letter or "
            "digit and hold only letters, digits, '.', '_' and '-'. Rename it."
        )
    try:
        if not path.is_file():
            raise ConfigError(f"Cannot read {path}: it is {'a folder' if path.is_dir() else 'no regular file'}.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(f"Cannot read {path}: it has {size:,} bytes, and at most {MAX_BYTES:,} are accepted.")
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Cannot read {path}: byte {error.start + 1} is not UTF-8.") from error


def locate(kind: str, name: str, folders: Sequence[Path], beside: Path = Path()) -> Path:
    """The file that a name or a path stands for.

    Args:
        name: a path if it contains a separator or ends in `.yaml` or `.yml`; else `NAME.yaml` in the first of the
            folders that holds it.
        beside: folder that a path starts from.

    Raises:
        ConfigError: there is none; says which names there are.
    """
    if len(name) > MAX_TEXT or not name.isprintable():
        raise ConfigError(f"Cannot find {kind} {shown(name)}: no file can have this name.")
    if "/" in name or name.endswith((".yaml", ".yml")):
        candidates = [beside / name]
        folders = [candidates[0].parent, *folders]
    else:
        candidates = [folder / f"{name}.yaml" for folder in folders]
    missing = f"Cannot find {kind} {name!r}: there is no {' or '.join(map(str, candidates))}"
    for candidate in candidates:
        if os.path.exists(candidate):  # noqa: PTH110 (`Path.exists` raises for a name that is too long)
            return candidate
    found = list(dict.fromkeys(path.stem for folder in folders for path in sorted(folder.glob("*.yaml"))))
    if not found:
        raise ConfigError(f"{missing}, nor any other. Start in the project's folder, or give the path of a file.")
    raise ConfigError(f"{missing}{nearest(Path(name).stem, found) or '.'} There are: {', '.join(found)}.")


def shown(value: object) -> str:
    """A value that a file gave, on one line and not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number that Python writes no digits of
        return "a very large number"


def _located(path: Path, text: str, place: tuple[int, int], message: str) -> str:
    """A fault with its place, and the line of the file with a caret under it.

    Args:
        place: line and column, from 0.
    """
    line, column = place
    first, *more = message.splitlines()
    shown_lines = [f"  {path}:{line + 1}:{column + 1}: {first}"]
    if line < len(lines := text.splitlines()):
        start = max(0, column - MAX_SHOWN // 2)
        part = "".join(char if char.isprintable() else " " for char in lines[line][start : start + MAX_SHOWN])
        width = sum(2 if east_asian_width(char) in "WF" else 1 for char in part[: column - start])
        shown_lines += [f"      {part.rstrip()}", " " * (6 + width) + "^"]
    return "\n".join([*shown_lines, *(f"  {each}" for each in more)])


def _fault(model: type[BaseModel], root: Node | None, details: ErrorDetails) -> tuple[tuple[int, int], str]:
    """(line and column in the file, the fault in words)."""
    kind, location, value, context = details["type"], details["loc"], details["input"], details.get("ctx", {})
    message = details["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list").replace("Tuple", "List")
    if kind.startswith("union_tag"):  # about the key that tells alternatives apart, which pydantic does not locate
        tag = context["discriminator"].strip("'")
        names = [name for block in _blocks(model, location) for name in get_args(block.model_fields[tag].annotation)]
        location, value = (*location, tag), value.get(tag)
        kind, context = "literal_error", {"expected": str(names)}
        message = f"Input should be one of {', '.join(names)}"
    place, path = _place(
        root,
        location,
        keep_last=kind == "missing" or details["type"].startswith("union_tag"),
        of_key=kind in ("extra_forbidden", "invalid_key"),
    )
    if kind in ("extra_forbidden", "invalid_key"):
        keys = _keys(model, location[:-1])
        message = f"Unknown key{nearest(location[-1], keys) or '.'} The keys here are {', '.join(keys)}"
    elif kind == "missing":
        [field] = {block.model_fields[str(location[-1])].description for block in _blocks(model, location[:-1])}
        message = f"Missing key. {field}"
    elif kind in ("model_type", "model_attributes_type"):
        message = f"Input should be a block with the keys {', '.join(_keys(model, location))}, but got {shown(value)}"
    elif kind not in ("value_error", "too_short"):  # the models' own messages show the value where that helps
        accepted = re.findall(r"'([^']+)'", context.get("expected", "")) if kind == "literal_error" else []
        message += f", but got {shown(value)}{nearest(value, accepted)}"
    return place, f"{path}{': ' if path else ''}{message}"


def _place(
    node: Node | None, location: Sequence[int | str], keep_last: bool, of_key: bool
) -> tuple[tuple[int, int], str]:
    """(line and column, path in the file) of a pydantic location.

    A part that the file does not have is left out, such as the tag of an alternative.

    Args:
        keep_last: name the last part even so, since it is a key that is missing.
        of_key: the place is the last key's, not that of its value. So is that of a block, which begins a line later.
    """
    place, path = _start(node) if node else (0, 0), ""
    for number, part in enumerate(location, 1):
        entries: list[tuple[Any, Node, Node]] = []
        if isinstance(node, MappingNode):
            entries = [(key.value, key, inner) for key, inner in node.value]
        elif isinstance(node, SequenceNode):
            entries = [(index, inner, inner) for index, inner in enumerate(node.value)]
        in_list = isinstance(node, SequenceNode)
        found = next((entry for entry in entries if str(entry[0]) == str(part)), None)
        if found is not None:
            _, key, node = found
            below = _start(key)[0] != _start(node)[0] or (isinstance(node, CollectionNode) and not node.flow_style)
            place = _start(key if below or (of_key and number == len(location)) else node)
        elif not keep_last or number < len(location):
            continue
        path += f"[{part}]" if in_list else f"{'.' if path else ''}{_printable(str(part))}"
    return place, path


def _start(node: Node) -> tuple[int, int]:
    return node.start_mark.line, node.start_mark.column


def _blocks(model: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """The model of the block at a pydantic location, or each of its alternatives."""
    blocks = [model]
    for part in location:
        fields = [block.model_fields[str(part)] for block in blocks if part in block.model_fields]
        if fields:
            blocks = list(_models(fields[0].annotation))
        else:  # the tag of an alternative
            blocks = [one for one in blocks if any(part in get_args(f.annotation) for f in one.model_fields.values())]
    return blocks


def _keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    return list(dict.fromkeys(key for block in _blocks(model, location) for key in block.model_fields))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _printable(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= 60 else shown(key)
