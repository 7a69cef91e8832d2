"""Files that are not YAML, not there, or not what they should be: one message, which says what to mend."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from agnews_lora.config.yaml import MAX_BYTES, Document, Settings, load, locate
from agnews_lora.errors import ConfigError
from tests.config.conftest import lines_and_faults


class Wool(Settings):
    kind: Literal["wool"]
    ply: int


class Silk(Settings):
    kind: Literal["silk"]


class Pattern(Document):
    """A small document with one field of each sort."""

    title: Annotated[str, Field(min_length=1)]
    """What it is called."""
    rows: Annotated[int, Field(ge=1)] = 10
    tension: Annotated[float, Field(gt=0)] = 0.5
    stitch: Literal["knit", "purl"] = "knit"
    yarn: Annotated[Wool | Silk | None, Field(discriminator="kind")] = None


def write(folder: Path, content: str | bytes, name: str = "scarf") -> Path:
    path = folder / f"{name}.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message(folder: Path, content: str | bytes) -> str:
    """The error, without its beginning."""
    path = write(folder, content)
    with pytest.raises(ConfigError) as caught:
        load(Pattern, path)
    assert str(caught.value).startswith(f"Cannot read {path}: ")
    return str(caught.value).removeprefix(f"Cannot read {path}: ")


def faults(folder: Path, content: str | bytes) -> list[str]:
    """The first line of the message, and its faults."""
    said = message(folder, content)
    return [said.splitlines()[0], *lines_and_faults(said)]


def test_a_file_becomes_a_frozen_document_that_knows_its_name_and_text(tmp_path: Path) -> None:
    text = "title: scarf  # not the name\nrows: 1_000\ntension: 2e-1\n"
    pattern = load(Pattern, write(tmp_path, text, "winter-1.2"))
    assert (pattern.title, pattern.rows, pattern.tension, pattern.stitch) == ("scarf", 1000, 0.2, "knit")
    assert pattern.name == "winter-1.2"
    assert pattern.source_text == text
    with pytest.raises(ValueError, match="frozen"):
        pattern.rows = 3  # type: ignore[misc]


def test_every_fault_is_reported_at_once_with_line_path_and_value(tmp_path: Path) -> None:
    content = "rows: 0\ntension: 0\n\nstitch: perl\nyarn:\n  kind: wool\n  ply: two\ncolour: red\n"
    assert faults(tmp_path, content) == [
        "6 faults",
        "1: title: Missing key. What it is called.",
        "1: rows: Input should be greater than or equal to 1, but got 0",
        "2: tension: Input should be greater than 0, but got 0",
        "4: stitch: Input should be 'knit' or 'purl', but got 'perl'. Did you mean purl?",
        "7: yarn.ply: Input should be a valid integer, but got 'two'",
        "8: colour: Unknown key. The keys here are title, rows, tension, stitch, yarn",
    ]


@pytest.mark.parametrize("value", ['"8"', "8.0", "true", "null", "[8]", "{eight: 8}", "2026-01-01", "eight"])
def test_a_whole_number_is_nothing_else(tmp_path: Path, value: str) -> None:
    [heading, fault] = faults(tmp_path, f"title: a\nrows: {value}\n")
    assert heading == "1 fault"
    assert fault.startswith("2: rows: Input should be a valid integer, but got ")


@pytest.mark.parametrize("value", ['"0.5"', "true", ".nan", ".inf", "-.inf", "1e999", "~"])
def test_a_number_is_finite_and_no_text(tmp_path: Path, value: str) -> None:
    [_, fault] = faults(tmp_path, f"title: a\ntension: {value}\n")
    assert re.match(r"2: tension: Input should be a (valid|finite) number, but got ", fault)


@pytest.mark.parametrize(
    ("key", "hint"), [("row", " Did you mean rows?"), ("titel", " Did you mean title?"), ("xyz", ""), ("3", "")]
)
def test_an_unknown_key_meets_its_nearest_neighbour(tmp_path: Path, key: str, hint: str) -> None:
    [_, fault] = faults(tmp_path, f"title: a\n{key}: 3\n")
    assert fault == f"2: {key}: Unknown key.{hint} The keys here are title, rows, tension, stitch, yarn"


@pytest.mark.parametrize(
    ("yarn", "fault"),
    [
        ("{kind: silk, ply: 2}", "yarn.ply: Unknown key. The keys here are kind"),
        ("{ply: 2}", "yarn.kind: Input should be one of wool, silk, but got null"),
        ("{kind: woll}", "yarn.kind: Input should be one of wool, silk, but got 'woll'. Did you mean wool?"),
        ("3", "yarn: Input should be a block with the keys kind, ply, but got 3"),
    ],
)
def test_alternatives_are_told_apart_by_their_kind(tmp_path: Path, yarn: str, fault: str) -> None:
    assert faults(tmp_path, f"title: a\nyarn: {yarn}\n") == ["1 fault", f"2: {fault}"]


@pytest.mark.parametrize(
    ("content", "got"), [("", "null"), ("# only a comment\n", "null"), ("- 1\n", "[1]"), ("hello", "'hello'")]
)
def test_a_file_is_a_block(tmp_path: Path, content: str, got: str) -> None:
    rule = "Input should be a block with the keys title, rows, tension, stitch, yarn"
    assert faults(tmp_path, content) == ["1 fault", f"1: {rule}, but got {got}"]


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ("title: a\n rows: 3\n", "2:6", "mapping values are not allowed here"),
        ("title: a\nrows: 1\nrows: 2\n", "3:1", 'found duplicate key "rows"'),
        ("title: [a\n", "2:1", "but got '<stream end>'"),
        ("title: !!python/object/apply:os.getcwd []\n", "1:8", "could not determine a constructor"),
        ("title: a\n---\ntitle: b\n", "2:1", "expected a single document"),
    ],
)
def test_broken_yaml_is_named_by_line_and_column(tmp_path: Path, content: str, place: str, reason: str) -> None:
    assert re.match(rf"not valid YAML\n  \S+:{place}: .*{re.escape(reason)}", message(tmp_path, content))


@pytest.mark.parametrize(
    ("line", "shown", "marked"),
    [
        ("rows: 0  # few", "rows: 0  # few", "0  # few"),
        ("title: a\ncolour: red", "colour: red", "colour: red"),
        ("yarn:\n  kind: wool\n  ply: [1]", "  ply: [1]", "[1]"),
        (f"{{title: {'a' * 3_000}, rows: x}}", f"{'a' * 40}, rows: x}}", "x}"),
    ],
)
def test_the_place_of_a_fault_is_marked_under_its_line(tmp_path: Path, line: str, shown: str, marked: str) -> None:
    *_, excerpt, caret = message(tmp_path, f"{line}\n").splitlines()
    assert excerpt.endswith(shown) and len(excerpt) < 120
    assert caret.strip() == "^" and excerpt[caret.index("^") :] == marked


def test_a_caret_stands_under_its_column_behind_wide_characters(tmp_path: Path) -> None:
    *_, excerpt, caret = message(tmp_path, "{title: '東京', rows: x}\n").splitlines()
    assert len(caret) - 1 == excerpt.index("x") + 2  # each of the two takes two columns


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", "byte 1 is not UTF-8"),
        (b"title: \x00", "not valid YAML"),
        (b"title: 2026-99-99", "month must be in 1..12"),
        (b"title: !!bool maybe", "a value does not fit its YAML type"),
        (b'title: "\\UFFFFFFFF"', "a value does not fit its YAML type"),
        (b"rows: " + b"9" * 5_000, "Exceeds the limit (4300 digits) for integer string conversion"),
        (b"[" * 20_000, "nested too deep"),
        (b"# " + b"a" * MAX_BYTES, f"at most {MAX_BYTES:,} are accepted"),
    ],
)
def test_what_is_no_yaml_at_all_is_said_so(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in message(tmp_path, content)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "content", ["title: &self [*self, *self]\n", "title: &title a\nstitch: *title\n", BOMB + "stitch: *a11\n"]
)
def test_an_alias_is_refused_before_anything_is_made_of_it(tmp_path: Path, content: str) -> None:
    [_, fault] = faults(tmp_path, content)
    assert re.match(r"\d+: an alias \(\*\w+\) is not accepted", fault)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("[[[1]], {a: {b: 1}}]", "[[...], {...}]"),
        ("0x" + "f" * 9_000, "a very large number"),
        ("[0x" + "f" * 9_000 + "]", "a very large number"),
        ("0x" + "f" * 50, str(16**50 - 1)[:28] + "..." + str(16**50 - 1)[-29:]),
    ],
)
def test_a_value_is_shown_shortly(tmp_path: Path, value: str, got: str) -> None:
    [_, fault] = faults(tmp_path, f"title: {value}\n")
    assert fault == f"1: title: Input should be a valid string, but got {got}"


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ('"a\\nb"', r"'a\nb'"),
        ('"\\e[31m"', r"'\x1b[31m'"),
        ("''", "''"),
        ("x" * 70, f"'{'x' * 27}...{'x' * 28}'"),
    ],
)
def test_a_key_is_shown_on_one_line_and_steers_no_terminal(tmp_path: Path, key: str, shown: str) -> None:
    [_, fault] = faults(tmp_path, f"title: a\n{key}: 3\n")
    assert fault.startswith(f"2: {shown}: Unknown key. ")


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    assert load(Pattern, write(tmp_path, b"\xef\xbb\xbftitle: a\n")).title == "a"


@pytest.mark.parametrize("name", ["my scarf", "a:b", "-a", "été"])
def test_a_file_has_a_name_that_runs_can_carry(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="must start with a letter or digit"):
        load(Pattern, write(tmp_path, "title: a\n", name))


def test_a_folder_and_an_unreadable_file_are_said_so(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        load(Pattern, tmp_path / "folder.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(ConfigError, match="it is no regular file"):
        load(Pattern, tmp_path / "loop.yaml")


TOKENS = (
    r"""title rows [ ] { } , !!int !!bool !!set !!omap !!timestamp !x &a *a ? : - ' " | > 0x 2020-13-45 1e5 << # @ \x"""
)
PIECES = st.sampled_from([*TOKENS.split(), " ", ": ", "\n", "\t", "\n---\n", "%YAML 1.2\n", "\u2028", "9" * 5000])


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_whatever_a_file_holds_is_a_document_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, content: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), content, "any")
    try:
        load(Pattern, path)
    except ConfigError as error:
        assert str(error).startswith(f"Cannot read {path}: ")


def test_a_name_is_looked_for_in_the_folders_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    both, only = write(first, "", "scarf"), write(second, "", "hat")
    write(second, "", "scarf")
    assert locate("pattern", "scarf", [first, second]) == both
    assert locate("pattern", "hat", [first, second]) == only
    with pytest.raises(ConfigError) as caught:
        locate("pattern", "scraf", [first, second])
    assert str(caught.value) == (
        f"Cannot find pattern 'scraf': there is no {first}/scraf.yaml or {second}/scraf.yaml. Did you mean scarf? "
        "There are: scarf, hat."
    )


def test_a_path_starts_from_where_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "", "scarf")
    assert locate("pattern", str(path), []) == path
    assert locate("pattern", "scarf.yaml", [], beside=tmp_path) == path
    assert locate("pattern", "./scarf.yaml", [], beside=tmp_path) == tmp_path / "./scarf.yaml"
    with pytest.raises(ConfigError, match=r"there is no .*/hat\.yaml\. There are: scarf\.$"):
        locate("pattern", "hat.yaml", [], beside=tmp_path)


def test_a_path_that_should_have_been_a_name_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("patterns").mkdir()
    write(Path("patterns"), "", "scarf")
    with pytest.raises(ConfigError, match=r"there is no scarf\.yaml\. Did you mean scarf\? There are: scarf\."):
        locate("pattern", "scarf.yaml", [Path("patterns")])


@pytest.mark.parametrize("name", ["a" * 5_000, "scarf\0", "./\x1b[31m.yaml", "\udcff"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Cannot find pattern '.{4,70}': no file can have this name") as caught:
        locate("pattern", name, [Path("patterns")])
    assert str(caught.value).isprintable()


def test_a_name_that_the_file_system_refuses_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot find pattern 'a+': there is no .*a\.yaml"):
        locate("pattern", "a" * 300, [tmp_path])


def test_without_any_file_the_remedy_is_the_project_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*scarf\.yaml, nor any other\. Start in the project's folder"):
        locate("pattern", "scarf", [tmp_path / "patterns"])
