"""What this project's code never does, read from the code itself: each rule is shown to bite."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import agnews_lora

PACKAGE = Path(agnews_lora.__file__).parent
PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
EVERYWHERE = ("0.0.0.0", "::", "[::]")


def faults(source: str) -> Iterator[str]:
    """Line and rule of everything in a source that is not safe by default."""
    for node in ast.walk(ast.parse(source)):
        for rule in rules_broken(node):
            yield f"line {getattr(node, 'lineno', 0)}: {rule}"


def rules_broken(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names) if any(name.name.split(".")[0] in PICKLES for name in names):
            yield "no pickle"
        case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLES:
            yield "no pickle"
        case ast.Constant(value=str(address)) if address in EVERYWHERE:
            yield "servers bind to loopback unless told otherwise"
        case ast.Call(func=function, keywords=keywords):
            name = ast.unparse(function)
            given = {each.arg: ast.unparse(each.value) for each in keywords}
            yield from call_faults(name, given, node)


def call_faults(name: str, given: dict[str | None, str], call: ast.Call) -> Iterator[str]:
    if name in ("eval", "exec", "os.system", "os.popen"):
        yield f"no {name}"
    if given.get("shell", "False") != "False":
        yield "no shell"
    if given.get("allow_pickle", "False") != "False":
        yield "no pickle in arrays"
    if given.get("trust_remote_code", "False") != "False":
        yield "no code of others"
    if name.endswith("torch.load") and given.get("weights_only") != "True":
        yield "torch loads weights only"
    if name.startswith("yaml.") and name.endswith("load") and not given.get("Loader", "").endswith("SafeLoader"):
        yield "YAML by the safe loader"
    if f".{name}".endswith(".YAML") and given.get("typ") != "'safe'":
        yield "YAML by the safe loader"
    if name.endswith("from_pretrained") and "AutoModel" in name and given.get("use_safetensors") != "True":
        yield "models from safetensors alone"
    if name.endswith("extractall") and given.get("filter") != "'data'":
        yield "archives stay in their folder"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_breaks_a_rule(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "YAML()",
        "YAML(typ='unsafe')",
        "eval('1')",
        "exec(code)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "server.bind(('0.0.0.0', 5000))",
        "HOST = '0.0.0.0'",
        "AutoModel.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "archive.extractall(folder)",
    ],
)
def test_each_rule_bites(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x', weights_only=True)",
        "np.load('x', mmap_mode='r')",
        "YAML(typ='safe', pure=True)",
        "model.eval()",
        "subprocess.run(['ls'], shell=False)",
        "HOST = '127.0.0.1'",
        "AutoModel.from_pretrained(name, use_safetensors=True)",
    ],
)
def test_no_rule_bites_what_is_safe(source: str) -> None:
    assert list(faults(source)) == []
