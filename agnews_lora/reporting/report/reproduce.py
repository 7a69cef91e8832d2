"""How to get the same again: code, versions, device, revisions, commands, files."""

from agnews_lora.reporting.report.document import (
    Block,
    Code,
    Column,
    Listing,
    Paragraph,
    Section,
    Strong,
    Table,
    Text,
    say,
    sentences,
)
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.report.wording import capital, day, seconds

COMMIT = "mlflow.source.git.commit"
DEFAULT_SWEEP = "embedded"  # what `make sweep` runs unless told


def reproduce(dossier: Dossier) -> Section:
    files = [
        Listing(say("{name}, as the sweep read it.", name=Code(name)), text.rstrip())
        for name, text in dossier.files.items()
    ]
    blocks: list[Block] = [
        Paragraph(_introduction(dossier)),
        Listing(say("From a checkout of the project."), _commands(dossier)),
        _provenance(dossier),
    ]
    return Section("How to reproduce", (*blocks, *files))


def _introduction(dossier: Dossier) -> Text:
    tags = dossier.tags
    if COMMIT not in tags:
        where = say(
            "The sweep ran from an installed package, version {version}: no checkout tells its commit.",
            version=tags.get("version.agnews_lora", "unknown"),
        )
    elif tags.get("git.dirty") == "true":
        where = say(
            "The sweep ran from commit {commit} {dirty}: what those were is not recorded, and that commit alone may "
            "not give the same.",
            commit=Code(tags[COMMIT][:12]),
            dirty=Strong("with uncommitted changes"),
        )
    else:
        where = say("The sweep ran from commit {commit}, without uncommitted changes.", commit=Code(tags[COMMIT][:12]))
    return sentences(
        where,
        "All that is random follows from the seeds in the files below: the split, the order of the data, the initial "
        "weights, and what the sampler asks. The same versions on the same kind of device give the same trials; on "
        "another, the last digits of floating-point sums differ, and with them, sooner or later, a trial's fate.",
    )


def _commands(dossier: Dossier) -> str:
    lines = [f"git checkout {dossier.tags[COMMIT]}"] if COMMIT in dossier.tags else []
    named = "" if dossier.sweep == DEFAULT_SWEEP else f" SWEEP={dossier.sweep}"
    definition = dossier.definition
    if definition and dossier.asked and dossier.asked != definition.trials:
        lines.append(f"make setup && .venv/bin/agnews-lora sweep {dossier.sweep} --trials {dossier.asked}")
    else:
        lines.append(f"make sweep{named}")
    if dossier.registered and dossier.registered.checks:
        lines.append(f"make promote{named}")
    return "\n".join([*lines, f"make report{named}"])


def _provenance(dossier: Dossier) -> Table:
    tags = dossier.tags
    rows: list[tuple[str, Text]] = []

    def add(name: str, value: str | None, *, code: bool = False) -> None:
        if value:
            rows.append((name, (Code(value),) if code else (value,)))

    add("commit", tags.get(COMMIT), code=True)
    add("base model", dossier.params.get("base"), code=True)
    add("its revision", tags.get("base_revision"), code=True)
    add("digest of training and validation rows", tags.get("data_digest"), code=True)
    add("device", tags.get("device"))
    versions = [f"{key.removeprefix('version.')} {tags[key]}" for key in sorted(tags) if key.startswith("version.")]
    add("versions", ", ".join(versions))
    add("begun", f"{day(dossier.began)}, {dossier.began:%H:%M} UTC")
    if dossier.ended and dossier.is_complete:
        add("from first start to end", f"{seconds((dossier.ended - dossier.began).total_seconds())}, pauses included")
    return Table(
        "provenance",
        say("What this sweep ran with."),
        (Column("what"), Column("value", wide=True)),
        tuple(((capital(name),), value) for name, value in rows),
    )
