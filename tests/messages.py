"""The messages in the package's source, read from the code itself, with an ellipsis for whatever varies."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import agnews_lora

PACKAGE: Final = Path(agnews_lora.__file__).parent
VARIES: Final = "…"
# What validators of the configuration, of the command line's words and of rows raise, by room: the user reads its text.
VALIDATORS: Final = {"ValueError": "config", "ArgumentTypeError": "cli", "_MalformedRow": "data"}


@dataclass(frozen=True)
class Message:
    """A text with `…` for what varies. place: `file:line`."""

    text: str
    place: str

    @property
    def fragments(self) -> list[str]:
        """What does not vary, where it has a word in it."""
        return [part for part in map(normal, self.text.split(VARIES)) if re.search(r"[A-Za-z]{2}", part)]

    def is_quoted_by(self, quotation: str) -> bool:
        """Whether all fragments stand in it, in their order."""
        return re.search(".*?".join(map(re.escape, self.fragments)), quotation) is not None


def normal(text: str) -> str:
    """With single spaces, and none around it."""
    return " ".join(text.split())


class Module:
    """One module's source, and how its expressions read as texts."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(PACKAGE).as_posix()
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.constants: dict[str, str] = {}
        for node in self.tree.body:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value)))
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(value)))
                ):
                    self.constants[name] = value

    def adopt(self, modules: dict[str, "Module"]) -> None:
        """Know the constants that are imported from other modules of the package."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agnews_lora."):
                source = modules.get(f"{str(node.module).removeprefix('agnews_lora.').replace('.', '/')}.py")
                for alias in node.names:
                    if source and alias.name in source.constants:
                        self.constants.setdefault(alias.asname or alias.name, source.constants[alias.name])

    def read(self, node: ast.AST, functions: dict[str, ast.FunctionDef], local: dict[str, ast.AST]) -> str:
        """An expression as a text. functions: by name, whose result may be the text. local: names of the scope."""

        def read(inner: ast.AST) -> str:
            return self.read(inner, functions, local)

        text = self._constant(node)
        match node:
            case ast.Constant(value=str(value)):
                text = value
            case ast.JoinedStr(values=parts):
                text = "".join(
                    self._constant(part.value) if isinstance(part, ast.FormattedValue) else read(part) for part in parts
                )
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                text = read(left) + read(right)
            case ast.Call(
                func=ast.Attribute(value=ast.Constant(value=str(glue)), attr="join"), args=[ast.List(elts=parts)]
            ):
                text = glue.join(map(read, parts))
            case ast.Call(func=ast.Name(id=name)) if name in functions:
                [*_, last] = [part for part in ast.walk(functions[name]) if isinstance(part, ast.Return)]
                text = self.read(last.value, functions, {}) if last.value else VARIES
            case ast.Name(id=name) if name in local:
                text = self.read(local[name], functions, {})
        return text

    def _constant(self, node: ast.AST) -> str:
        return self.constants.get(node.id, VARIES) if isinstance(node, ast.Name) else VARIES

    def texts(self) -> Iterator[str]:
        """Every text in the module, and what each joins of several."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp | ast.Call):
                text = self.read(node, {}, {})
                if text != VARIES:
                    yield text

    def scopes(self) -> Iterator[tuple[list[ast.AST], dict[str, ast.AST]]]:
        """(nodes, {name: what it is set to, if once}) of each function, and of the rest of the module."""
        inside: set[ast.AST] = set()
        for function in (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)):
            nodes = [node for node in ast.walk(function) if node not in inside]
            yield nodes, _assigned(nodes)
            inside.update(ast.walk(function))


def _assigned(nodes: list[ast.AST]) -> dict[str, ast.AST]:
    found: dict[str, list[ast.AST]] = {}
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.setdefault(name, []).append(value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def modules() -> list[Module]:
    """All modules of the package."""
    found = {module.name: module for module in map(Module, sorted(PACKAGE.rglob("*.py")))}
    for module in found.values():
        module.adopt(found)
    return list(found.values())


def error_classes() -> set[str]:
    """Names of the exceptions that a user can meet."""
    [errors] = [module for module in modules() if module.name == "errors.py"]
    return {node.name for node in ast.walk(errors.tree) if isinstance(node, ast.ClassDef)}


def raised() -> list[Message]:
    """The message of every place that raises an exception for the user, or is a validator's fault; those with words."""
    everything, classes = modules(), error_classes()
    functions = {
        node.name: node
        for module in everything
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and node.name == "breach"
    }
    messages = []
    for module in everything:
        for nodes, local in module.scopes():
            for node in nodes:
                if isinstance(node, ast.Call) and node.args and _is_for_the_user(_called(node), module.name, classes):
                    text = module.read(node.args[0], functions, local)
                    message = Message(normal(text), f"agnews_lora/{module.name}:{node.lineno}")
                    if message.fragments:
                        messages.append(message)
    return messages


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _is_for_the_user(name: str, module: str, classes: set[str]) -> bool:
    return name in classes or (name in VALIDATORS and module.startswith(VALIDATORS[name]))


def said() -> list[str]:
    """What does not vary of every text in the package, for finding a quotation in it."""
    return [normal(part) for module in modules() for text in module.texts() for part in text.split(VARIES)]
