"""Mutants of a small project's files, each made by its number alone, so that a failing one can be made again."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

YAML_FILES: Final = ("experiments/small.yaml", "sweeps/small.yaml")
CSV_FILE: Final = "train.csv"
FILES: Final = (*YAML_FILES, CSV_FILE)
SWEEP: Final = "small"
PIPE: Final = "pipe"  # a named pipe that nobody writes to
LOOP: Final = "loop"  # a link to itself
MADE: Final = "made-by-a-tag"  # what a tag that runs commands would write

VALUES: Final = (
    *(
        "",
        "~",
        "[]",
        "{}",
        "true",
        "-1",
        "0",
        "1.5",
        ".nan",
        ".inf",
        "-.inf",
        "1e999",
        "1e-320",
        "1e308",
        "0o17",
        "0b2",
    ),
    *("9" * 40, "-" + "9" * 400, "9" * 5_000, "0x" + "f" * 300, "0x" + "f" * 9_000, "[0x" + "f" * 9_000 + "]"),
    *("'text'", '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', '"\\e[31m"', '"\\u2028"', "ünï", "2001-02-30", "2001-01-01"),
    *("[1, [2, [3]]]", "{a: {b: c}}", "{1: 2}", "{? [a] : b}", "*nowhere", "&x", "@at", "`tick`", "%p", "|", ">-"),
    *("[red]", "'[/]'", "a" * 10_000, "[qk, qk]", "[qk, qw]", "{low: 1, high: 0}", "{low: 1e-320, high: 1e-319}"),
)
TAGS: Final = (
    *("!!binary aGk=", "!!binary '@'", "!!set {a}", "!!omap [a: 1]", "!!omap 3", "!!timestamp x", "!!timestamp [x]"),
    *("!!int ''", "!!float x", "!!bool x", "!!null x", "!!str [a]", "!!map 3", "!!merge 3", "!x y", "!<x> y"),
    f"!!python/object/apply:os.system ['touch {MADE}']",
    f"!!python/object/new:os.system ['touch {MADE}']",
    "!!python/name:os.system",
    "!!python/module:os",
)
PATHS: Final = (
    *("../../etc/passwd", "/etc/passwd", "a/../../b.csv", "..", ".", "/", "~", "'~/x'", "train.csv/", "'*.csv'", "''"),
    *(PIPE, LOOP, "/dev/zero", "/dev/stdin", "/proc/self/mem", "'[/]'", "'http://127.0.0.1/x'", "file:///etc/passwd"),
    *("a" * 10_000, "a/" * 3_000, '"train.csv\\0"', '"a\\nb"', '"\\ud800"', '"\\e]0;x\\a"'),
)
NAMES: Final = (
    *("", ".", "..", "../small", "..yaml", "small.", "./sweeps", "/", "~", "[/]", "sma\nll", "small\0", "\udcff", "%s"),
    *("/dev/zero", "/dev/zero.yaml", f"./{PIPE}", f"./{LOOP}", "sweeps/small.yaml/", "a" * 10_000, "a/" * 3_000),
)
LAUGHS: Final = "a: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES: Final = "b0: &b0 {x: 1}\n" + "".join(
    f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@dataclass(frozen=True)
class Mutant:
    """What one number changes. file: whose content; None where it is the name that is asked for."""

    number: int

    @property
    def kind(self) -> str:
        return KINDS[self.number % len(KINDS)]

    @property
    def file(self) -> str | None:
        if self.kind == "name":
            return None
        if self.kind in DATA_PATHS:
            return YAML_FILES[0]
        choice = YAML_FILES if self.kind in ON_YAML else (CSV_FILE,) if self.kind in ON_CSV else FILES
        return Random(self.number).choice(choice)

    @property
    def sweep(self) -> str:
        return NAMES[self.number // len(KINDS) % len(NAMES)] if self.kind == "name" else SWEEP

    def content(self, original: bytes) -> bytes:
        """What the file holds instead."""
        if self.kind in DATA_PATHS:
            return _data_path(original, len(DATA_PATHS) * (self.number // len(KINDS)) + DATA_PATHS.index(self.kind))
        return (ON_YAML | ON_CSV | ON_BYTES)[self.kind](original, Random(self.number))

    def __str__(self) -> str:
        return f"{self.number}-{self.kind}"


# Of any file ----------------------------------------------------------------------------------------------------------


def _flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _insert(*pieces: bytes) -> Callable[[bytes, Random], bytes]:
    def insert(content: bytes, random: Random) -> bytes:
        place = random.randrange(len(content) + 1)
        return content[:place] + random.choice(pieces) + content[place:]

    return insert


def _lines(change: Callable[[list[bytes], int, int], None]) -> Callable[[bytes, Random], bytes]:
    def change_lines(content: bytes, random: Random) -> bytes:
        lines = content.splitlines(keepends=True)
        change(lines, random.randrange(len(lines)), random.randrange(len(lines)))
        return b"".join(lines)

    return change_lines


def _delete(lines: list[bytes], first: int, second: int) -> None:
    del lines[first]


def _double(lines: list[bytes], first: int, second: int) -> None:
    lines.insert(second, lines[first])


def _swap(lines: list[bytes], first: int, second: int) -> None:
    lines[first], lines[second] = lines[second], lines[first]


ON_BYTES: Final[dict[str, Callable[[bytes, Random], bytes]]] = {
    "flipped-bits": _flip,
    "truncated": lambda content, random: content[: random.randrange(len(content))],
    "deleted-line": _lines(_delete),
    "doubled-line": _lines(_double),
    "swapped-lines": _lines(_swap),
    "empty": lambda content, random: random.choice((b"", b"\n", b" ", b"\0", b"\xef\xbb\xbf", b"---\n")),
    "byte-order-mark": lambda content, random: random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) + content,
    "line-ends": lambda content, random: content.replace(b"\n", random.choice((b"\r\n", b"\r", b"\n\n", b"\x0b"))),
    "control-characters": _insert(b"\0", b"\t", b"\x1b[31m", b"\x7f", b"\r", b"\xc2\x85", b"\xe2\x80\xa8"),
    "not-utf-8": _insert(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"),
    "open-quote": _insert(b'"', b"'", b'"""', b"[", b"{", b"|\n", b"#", b"&", b": "),
    "long-line": _insert(b"a" * 70_000, b"9" * 5_000, b" " * 70_000, b"#" * 60_000),
}

# Of a YAML file -------------------------------------------------------------------------------------------------------


def _value(*values: str) -> Callable[[bytes, Random], bytes]:
    """Another value for some key, as it would be written."""

    def replace(content: bytes, random: Random) -> bytes:
        lines = content.decode().splitlines()
        line = random.choice([index for index, line in enumerate(lines) if ":" in line])
        lines[line] = re.sub(r":.*", lambda _: f": {random.choice(values)}", lines[line], count=1)
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")

    return replace


def _path(content: bytes, random: Random) -> bytes:
    """Another path for the base, or for the experiment that a sweep names."""
    return re.sub(rb"(base|experiment): [^\n]*", lambda line: line[1] + b": " + random.choice(PATHS).encode(), content)


def _data_path(content: bytes, index: int) -> bytes:
    """The path of that index for one of the two CSV files."""
    key, path = (b"train", b"test")[index % 2], PATHS[index % len(PATHS)].encode()
    return re.sub(rb" %b: [^\n]*" % key, lambda _: b" " + key + b": " + path, content)


def _key(content: bytes, random: Random) -> bytes:
    keys = (
        "null",
        "1",
        "0x" + "f" * 9_000,
        "? [a, b]\n",
        "? {a: b}\n",
        "<<",
        '"\\0"',
        '"\\e[31m"',
        "''",
        "trials",
        "name",
    )
    return content + f"{random.choice(keys)}: {random.choice(VALUES)}\n".encode()


def _nested(content: bytes, random: Random) -> bytes:
    depth = random.choice((3, 90, 400, 20_000))
    opening, closing = random.choice((("[", "]"), ("{a: ", "}"), ("- ", "")))
    return content + f"deep:\n {opening * depth}1{closing * depth}\n".encode()[: 60 * 1024]


def _laughs(content: bytes, random: Random) -> bytes:
    bomb = random.choice((LAUGHS, MERGES, "a11: &a11 [*a11]\n", "a11: &a11 {<<: *a11}\n")).encode()
    keys = (b"alpha_ratio: *a11", b"base: *a11", b"? *a11\n: 1", b"trials: *a11", b"a12: !!timestamp [*a11]")
    return bomb + content + random.choice(keys) + b"\n"


def _document(content: bytes, random: Random) -> bytes:
    before = (
        "%YAML 1.1\n---\n",
        "%YAML 9.9\n---\n",
        "%YAML x\n---\n",
        f"%YAML 1.{'9' * 5_000}\n---\n",
        "%TAG ! x\n---\n",
    )
    after = ("---\na: b\n", "...\n---\n", "...\nx", "\n- a\n")
    either = random.random() < 0.5
    return random.choice(before).encode() + content if either else content + random.choice(after).encode()


ON_YAML: Final[dict[str, Callable[[bytes, Random], bytes]]] = {
    "value": _value(*VALUES),
    "value-again": _value(*VALUES),
    "tag": _value(*TAGS),
    "path": _path,
    "key": _key,
    "nested": _nested,
    "laughs": _laughs,
    "document": _document,
}

# Of a CSV file --------------------------------------------------------------------------------------------------------


def _row(*rows: str) -> Callable[[bytes, Random], bytes]:
    """One more row, as it would be written, somewhere in the file."""

    def insert(content: bytes, random: Random) -> bytes:
        lines = content.splitlines(keepends=True)
        lines.insert(random.randrange(len(lines) + 1), random.choice(rows).encode())
        return b"".join(lines)

    return insert


ON_CSV: Final[dict[str, Callable[[bytes, Random], bytes]]] = {
    "columns": _row("1\n", "1,a\n", "1,a,b,c\n", ",,\n", "\n", "1;a;b\n", "1\ta\tb\n", "1" + ",a" * 5_000 + "\n"),
    "label": _row(
        "0,a,b\n", "5,a,b\n", "-1,a,b\n", "1.0,a,b\n", "nan,a,b\n", f"{'9' * 5_000},a,b\n", "١,a,b\n", " 1,a,b\n"
    ),
    "header": _row(
        "Class Index,Title,Description\n", "class index,title,description\n", "label,text\n", "text,label\n"
    ),
    "text": _row(
        '1,"",""\n', "1,&lt;b&gt;,\\\n", "1,\x00,\x00\n", "1,\x1b[31m,<script>\n", "1,&#xD800;,&#0;\n", "1,=cmd(),@a\n"
    ),
    "quotes": _row('1,"a,b\n', '1,"a"b,c\n', '1,a"b,c\n', '1,"a""b",c\n', '1,"a\nb",c\n', "1,'a,b\n", '"1","a","b\n'),
    "long-text": _row(
        "1," + "a" * 200_000 + ",b\n",
        '1,"' + "a\n" * 50_000 + '",b\n',
        "1,a,&" + "amp;" * 30_000 + "\n",
        "1,a," + "</b" * 20_000 + ">" * 20_000 + "\n",
    ),
}

DATA_PATHS: Final = ("data-path", "data-path-again")  # two in a round, so that every path has its turn
KINDS: Final = (*ON_BYTES, *ON_YAML, *ON_CSV, *DATA_PATHS, "name")
