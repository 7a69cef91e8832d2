"""From a YAML file to a frozen, strict model, with every fault of the file reported at once.

Owns where experiments and sweeps are looked for, what is accepted as YAML (1.2, plain values only, each written out),
and the words that a fault is reported in: its path in the file, the rule, the value given, the nearest accepted word.
"""

import re
import reprlib
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent

from agnews_lora.errors import ConfigError

MAX_BYTES: Final = 64 * 1024  # far above any real file, and still parsed within seconds
MAX_TEXT: Final = 4_096  # characters; Linux knows no longer path
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel = 1


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
        """The file's name without its ending: what its studies, runs and models are named after."""
        return self._path.stem

    @property
    def source_text(self) -> str:
        """The file, word for word."""
        return self._source_text


DocumentT = TypeVar("DocumentT", bound=Document)


def load(model: type[DocumentT], path: Path) -> DocumentT:
    """Read a file into its model. Validators of the model find the path in their context under `path`.

    Raises:
        ConfigError: a file that cannot be read, is not YAML, or does not say something valid; names all its faults.
    """
    if not _NAME.fullmatch(path.stem):
        raise ConfigError(
            f"{path}: runs and models are named after the file, so its name must start with a letter or digit and hold "
            "only letters, digits, '.', '_' and '-'; rename it"
        )
    text = _read(path)
    try:
        document = model.model_validate(parse(text, path), context={"path": path})
    except ValidationError as error:
        raise ConfigError(faults_of(model, path, error)) from error
    document._path = path
    document._source_text = text
    return document


def faults_of(model: type[BaseModel], path: Path, error: ValidationError) -> str:
    """Every fault that a model found in a file, a line each, in the words of this module."""
    schema = model.model_json_schema()
    faults = [_fault(schema, details) for details in error.errors(include_url=False)]
    heading = f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}"
    return "\n".join([heading, *(textwrap.indent(fault, "  ") for fault in faults)])


def locate(kind: str, name: str, folders: Sequence[Path], beside: Path = Path()) -> Path:
    """The file that a name or a path stands for.

    A path contains a separator or ends in `.yaml` or `.yml`, and starts from `beside`. Any other name is that of
    `NAME.yaml` in the first of the folders that holds it.

    Raises:
        ConfigError: there is none; says where it was looked for and which names there are.
    """
    if rule := text_fault(name):
        raise ConfigError(f"the name of the {kind} {rule}")
    if "/" in name or name.endswith((".yaml", ".yml")):
        candidates = [beside / name]
        missing = f"no {kind} at {candidates[0]}"
        folders = [candidates[0].parent, *folders]
    else:
        candidates = [folder / f"{name}.yaml" for folder in folders]
        missing = f"no {kind} named {name!r} in {' or '.join(f'{folder}/' for folder in folders)}"
    for candidate in candidates:
        try:
            if candidate.exists():
                return candidate
        except OSError as error:  # what names no file there could be, such as one that is too long
            raise ConfigError(f"{missing} ({error.strerror})") from error
    found = list(dict.fromkeys(path.stem for folder in folders for path in sorted(folder.glob("*.yaml"))))
    if not found:
        raise ConfigError(f"{missing}, nor any other; start from the project's folder, or give the path of a file")
    raise ConfigError(f"{missing}{_suggestion(Path(name).stem, found)}; there are: {', '.join(found)}")


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise ConfigError(
                f"{path}: must be a YAML file, but is {'a folder' if path.is_dir() else 'something else'}"
            )
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: must be at most {MAX_BYTES:,} bytes, but has {size:,}; is it the right file?")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: must be UTF-8, but byte {error.start + 1} is not; is it the right file?") from error


def parse(text: str, path: Path) -> Any:
    """What a YAML text says. path: for the messages.

    Raises:
        ConfigError: it is not YAML, or not YAML that is accepted.
    """
    reader = YAML(typ="safe", pure=True)
    reader.Composer = _PlainComposer
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{path}{place}: not valid YAML: {reason}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, LookupError, ArithmeticError) as error:  # a tag, a date or an escape that does not fit its text
        reason = str(error).partition(";")[0]  # behind it, Python advises programmers
        raise ConfigError(
            f"{path}: not valid YAML: it holds a value that its type does not allow ({reason})"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deep; an experiment or sweep has at most three levels") from error


def _fault(schema: dict[str, Any], details: ErrorDetails) -> str:
    """One fault: path in the file, rule, value given."""
    kind, location, value = details["type"], details["loc"], details["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        path, block = _place(schema, location[:-1])
        key, keys = _shown_key(str(location[-1])), block["properties"]
        where = block.get("where", "here")
        return f"{_below(path, key)}: unknown key{_suggestion(key, keys)}; the keys {where} are {', '.join(keys)}"
    path, node = _place(schema, location)
    if kind.startswith("union_tag"):  # which alternative is meant is not said, or not validly
        tag = node["discriminator"]
        path, node = _below(path, tag["propertyName"]), {"enum": list(tag["mapping"])}
        kind, value = (
            ("literal_error", value[tag["propertyName"]]) if tag["propertyName"] in value else ("missing", None)
        )
    if kind == "missing":
        return f"{path}: is missing; must be {_rule(schema, node)}"
    if kind == "value_error":  # from a validator of the models, whose message says it all
        return f"{path}: {details['ctx']['error']}"
    suggestion = _suggestion(value, node.get("enum", []))
    return f"{path or 'the file'}: must be {_rule(schema, node)}, but got {shown(value)}{suggestion}"


def _place(schema: dict[str, Any], location: Sequence[int | str]) -> tuple[str, dict[str, Any]]:
    """(path as a person writes it, JSON schema of that place) of a pydantic location."""
    path, node = "", schema
    for part in location:
        if "discriminator" in node:  # pydantic names the chosen alternative in the location; the file has no such level
            tag = node["discriminator"]
            chosen = _resolved(schema, {"$ref": tag["mapping"][part]})
            node = {**chosen, "where": f"where {tag['propertyName']} is {part}"}
        elif isinstance(part, int):
            path, node = f"{path}[{part}]", _resolved(schema, node["items"])
        else:
            path, node = _below(path, part), _resolved(schema, node["properties"][part])
    return path, node


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> Any:
    """The definition that a reference stands for, and the value that an optional value has when it is there."""
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in node:
        there = next(branch for branch in node["anyOf"] if branch.get("type") != "null")
        return {**_resolved(schema, there), "optional": True}
    return node


def _rule(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """What a place of the schema accepts, in words."""
    match _resolved(schema, node):
        case {"enum": names}:
            rule = f"one of {', '.join(names)}"
        case {"const": name}:
            rule = str(name)
        case {"discriminator": {"propertyName": key, "mapping": choices}}:
            rule = f"a mapping whose key {key} is one of {', '.join(choices)}"
        case {"type": "object", "properties": keys, "optional": True}:
            rule = f"a mapping with the keys {', '.join(keys)}, or null"
        case {"type": "object", "properties": keys}:
            rule = f"a mapping with the keys {', '.join(keys)}"
        case {"type": "array", "items": entry}:
            rule = f"a list of at least one entry, each {_rule(schema, entry)}"
        case {"type": "string"}:
            rule = "a text that is not empty"
        case number:
            rule = f"{'a whole number' if number['type'] == 'integer' else 'a number'}{_bounds(number)}"
    return rule


def _bounds(number: dict[str, Any]) -> str:
    if "minimum" in number and "maximum" in number:
        return f" from {number['minimum']:_} to {number['maximum']:_}"
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    return " and".join(f" {word} {number[key]:_}" for key, word in words.items() if key in number)


def text_fault(text: str) -> str | None:
    """What is wrong with a text that names a file or is shown to people, as a rule with its value; None if nothing."""
    if len(text) > MAX_TEXT:
        return f"must be at most {MAX_TEXT:_} characters long, but got {len(text):_}"
    if strange := next((character for character in text if unicodedata.category(character) in ("Cc", "Cs")), None):
        return f"must hold no control characters, but got {shown(text)} with U+{ord(strange):04X}"
    return None


def _shown_key(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= 60 else shown(key)


def shown(value: object) -> str:
    """A value that a file gave, on one line and not too long."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
        case int() if value.bit_length() > 200:
            return f"a number of {value.bit_length():_} bits"
        case int() | float():
            return str(value)
        case _:
            return _short(list(value) if isinstance(value, tuple) else value)


def _short(value: object) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number in it that Python writes no digits of
        return f"a {type(value).__name__} of very large numbers"


def _suggestion(given: object, accepted: Iterable[str]) -> str:
    close = get_close_matches(given, accepted, n=1) if isinstance(given, str) else []
    return f" (did you mean {close[0]}?)" if close else ""
