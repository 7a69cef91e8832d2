"""The registered model: a folder whose content is proved by hashes, and how a sweep's winner becomes one.

The folder is in MLflow's own format. Its artifacts are the adapter (PEFT's files and record), the tokenizer and the
reference answers. The base is not in it: it is named, and found again where the model is loaded.
"""

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt

from agnews_lora.adapters.adapter_files import read_record, recount
from agnews_lora.adapters.base_models import KNOWN, BaseModel
from agnews_lora.adapters.budget import breach
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable, load_tokenizer, read_table, write_table
from agnews_lora.errors import BudgetError, PromotionError, RegistryError
from agnews_lora.paths import sha256_of
from agnews_lora.tracking.versions import CANDIDATE, REPORT, LocalVersion, Version
from agnews_lora.training.metrics import accuracy, macro_f1, mean_cross_entropy

if TYPE_CHECKING:
    from mlflow.models import Model

    from agnews_lora.search.results import Registration
    from agnews_lora.tracking.registry import Registry

ADAPTER: Final = "adapter"
TOKENIZER: Final = "tokenizer"
REFERENCE: Final = "reference"
ARTIFACTS: Final = (ADAPTER, TOKENIZER, REFERENCE)
ANSWERS: Final = "answers.safetensors"
ROWS: Final = "rows.safetensors"
HASH_TAG: Final = "sha256/"

NUM_FIXED_ROWS: Final = 64
LARGEST_DIFFERENCE: Final = 1e-4
LEAST_AGREEMENT: Final = 0.999
# How far an engine's figures may lie from plain PEFT's in fp32.
MOST_POINTS: Final = 0.002  # of the accuracy
MOST_OF_LOSS: Final = 0.01
LEAST_LOSS: Final = 0.001  # nats: a hundredth of less than 0.1 is within the rounding of bf16
LOSS_OF_A_ROW: Final = 0.5  # nats that one row may differ by: a mean over few rows is not averaged over bf16's rounding
# Of the logits' size (root mean square): labels that lie closer together fall either way in bf16. Without this, one in
# five weak adapters is off by three rows of 1,000 of AG News, though its loss is off by 0.03 % at most. One percent of
# a good adapter's rows lie so close; the loss, which needs no such allowance, tells a wrong engine as well.
BF16_NOISE: Final = 0.1
REGISTER_ANOTHER: Final = "register another version with `agnews-lora sweep`"

# What `mlflow_model.py` imports beside this package itself, which no index has: serve in the project's own environment
# (`mlflow models serve --env-manager local`).
REQUIREMENTS: Final = ("mlflow", "torch", "transformers", "peft", "safetensors", "numpy", "pandas")
EXAMPLE: Final = "Oil prices rose to a record as the central bank left its interest rate unchanged."


@dataclass(frozen=True)
class Package:
    """A registered version and its files. folder: where MLflow keeps them."""

    version: Version
    folder: Path

    @classmethod
    def verified(cls, registry: "Registry | LocalVersion", version: Version) -> Self:
        """A version's files, which are still those that were registered.

        Raises:
            RegistryError: files were changed, removed or added since, or an older release registered them.
        """
        package = cls.of(registry, version)
        if changed := package.changed():
            raise RegistryError(
                f"Cannot use {version}: {', '.join(changed)} changed since the registration. Put the files back, or "
                "return to the version before with `agnews-lora promote SWEEP --rollback`."
            )
        return package

    @classmethod
    def of(cls, registry: "Registry | LocalVersion", version: Version) -> Self:
        """A version's files, not verified.

        Raises:
            RegistryError: they are gone, or an older release registered them.
        """
        if f"{HASH_TAG}{REFERENCE}/{ANSWERS}" not in version.tags:
            raise RegistryError(
                f"Cannot use {version}: an older release made it. Register another with `agnews-lora sweep --new`."
            )
        return cls(version, registry.folder(version))

    @property
    def adapter(self) -> Path:
        return self.folder / "artifacts" / ADAPTER

    @property
    def tokenizer(self) -> Path:
        return self.folder / "artifacts" / TOKENIZER

    @property
    def reference(self) -> Path:
        return self.folder / "artifacts" / REFERENCE

    def changed(self) -> list[str]:
        """Names of files that differ from the version's tags: changed, missing or added ones, and links.

        Beside the artifacts MLflow may add files of its own.
        """
        tags = self.version.tags
        expected = {key.removeprefix(HASH_TAG): value for key, value in tags.items() if key.startswith(HASH_TAG)}
        present = {name: found for name, found in _all_hashes(self.folder).items() if "/" in name or name in expected}
        return sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))


def hashes(folders: Mapping[str, Path]) -> dict[str, str]:
    """{`<folder's name>/<file>`: SHA-256 (hex)} of all files in the folders given by name.

    Anything that is neither a file nor a folder has no hash, and so never equals a registered one: a link would be
    followed out of the folder, and its target can change at any time.
    """
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": _hash(path)
        for name, folder in folders.items()
        for path in (folder, *folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _all_hashes(folder: Path) -> dict[str, str]:
    """`hashes` of a model's artifacts, and those of MLflow's own files, the code that it runs among them."""
    own = {path.name: _hash(path) for path in folder.iterdir() if path.is_symlink() or path.is_file()}
    return own | hashes({name: folder / "artifacts" / name for name in ARTIFACTS})


def _hash(path: Path) -> str:
    return "no file" if path.is_symlink() or not path.is_file() else sha256_of(path)


@dataclass(frozen=True)
class ReferenceAnswers:
    """What the exported weights answered on the validation split when they were registered: plain PEFT, fp32.

    tokens: `token_digest` of the split. rows: [64] ids of the fixed rows. table: their tokens, for those who have the
    version but not the sweep's data. logits: [64, classes], of the fixed rows. predicted: [validation rows], labels.
    """

    tokens: str
    rows: npt.NDArray[np.int64]
    table: TokenTable
    logits: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], validation: TokenTable) -> Self:
        """From logits [rows, classes] on the whole split. 64 evenly spaced rows are fixed, or all of fewer."""
        taken = min(NUM_FIXED_ROWS, len(logits))
        rows = [index * len(logits) // taken for index in range(taken)]
        return cls(
            token_digest(validation), np.asarray(rows), validation.take(rows), logits[rows], logits.argmax(axis=-1)
        )

    def write(self, folder: Path) -> None:
        """Write them to a new folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True)
        arrays: dict[str, npt.NDArray[Any]] = {"rows": self.rows, "logits": self.logits, "predicted": self.predicted}
        save_file(arrays, folder / ANSWERS, metadata={"tokens": self.tokens})
        write_table(self.table, folder / ROWS)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The answers in a folder.

        Raises:
            RegistryError: they are not there, or not whole.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / ANSWERS, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                tokens = file.metadata()["tokens"]
            return cls(tokens, table=read_table(folder / ROWS), **arrays)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RegistryError(
                f"Cannot read the reference answers in {folder}: {error}. Register another version with "
                "`agnews-lora sweep --new`."
            ) from error

    def largest_difference(self, logits: npt.NDArray[np.float32]) -> float:
        """Largest absolute difference from logits [64, classes] of the fixed rows; NaN where one is no number."""
        return float(np.abs(logits.astype(np.float64) - self.logits).max())


def token_digest(table: TokenTable) -> str:
    """SHA-256 (hex) of the token ids of all rows, in order: what an answer depends on besides the weights."""
    sha = hashlib.sha256()
    for array in (table.ids, table.offsets):
        sha.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class Finding:
    """One check. found: the value, in words, with the remedy where the check failed."""

    rule: str
    found: str
    passed: bool

    @classmethod
    def of(cls, passed: bool, rule: str, found: str, remedy: str) -> Self:
        return cls(rule, found if passed else f"{found}; {remedy}", passed)


def failures(findings: Sequence[Finding]) -> str:
    """Every check that failed, a line each below their number."""
    failed = [f"{finding.rule}: {finding.found}" for finding in findings if not finding.passed]
    return "\n  - ".join([f"{len(failed)} of {len(findings)} checks failed", *failed])


def compare_reload(answers: ReferenceAnswers, logits: npt.NDArray[np.float32]) -> list[Finding]:
    """Checks of what a new process answered. logits: [validation rows, classes]."""
    difference = answers.largest_difference(logits[answers.rows])
    agreement = float((logits.argmax(axis=-1) == answers.predicted).mean())
    return [
        Finding.of(
            difference <= LARGEST_DIFFERENCE,
            f"in a new process, the logits of {len(answers.rows)} fixed validation rows must be the recorded ones "
            f"within {LARGEST_DIFFERENCE:g}",
            f"the largest difference is {difference:.2g}",
            REGISTER_ANOTHER,
        ),
        Finding.of(
            agreement >= LEAST_AGREEMENT,
            f"in a new process, {LEAST_AGREEMENT:.1%} of the validation split must get the recorded labels",
            f"{agreement:.2%} of {len(answers.predicted):,} rows do",
            REGISTER_ANOTHER,
        ),
    ]


@dataclass(frozen=True)
class Winner:
    """What a sweep found.

    Args:
        run_id: of the trial's run.
        adapter: folder with PEFT's files and the record.
        budget: trainable parameters.
        accuracy, loss: reported by the engine for the whole validation split at the trial's last step.
    """

    run_id: str
    adapter: Path
    sweep: str
    study: str
    budget: int
    accuracy: float
    loss: float


def require_reported(
    winner: Winner, trial: str, logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> None:
    """Check that the exported adapter does what the engine measured while it trained.

    Args:
        logits: [validation rows, classes], by plain PEFT in fp32.
        labels: [validation rows].

    Raises:
        PromotionError: accuracy or loss are not those that the engine reported.
    """
    noise = BF16_NOISE * float(np.sqrt(np.mean(np.square(logits))))

    def right(change: float) -> int:
        """Rows that are answered correctly where the logits of their labels change so."""
        changed = logits.copy()
        changed[np.arange(len(labels)), labels] += change
        return int(np.sum(changed.argmax(axis=-1) == labels))

    loss, reported = mean_cross_entropy(logits, labels), winner.accuracy * len(labels)
    allowed = max(MOST_POINTS * len(labels), 1) + 1e-6  # the accuracy is a rounded fraction
    same_loss = abs(loss - winner.loss) <= max(MOST_OF_LOSS * winner.loss, LEAST_LOSS, LOSS_OF_A_ROW / len(labels))
    if same_loss and right(-noise) - allowed <= reported <= right(noise) + allowed:
        return
    raise PromotionError(
        f"Cannot register {trial} of {winner.study}: on {len(labels):,} validation rows its adapter has accuracy "
        f"{right(0.0) / len(labels):.2%} and loss {loss:.4g} by plain PEFT in a new process, but accuracy "
        f"{winner.accuracy:.2%} and loss {winner.loss:.4g} by the engine (allowed: {MOST_POINTS:.1%} of the rows or "
        f"one, {MOST_OF_LOSS:.0%} of the loss or {LOSS_OF_A_ROW:g} of one row's). All trials are kept. Train by PEFT "
        "itself: set `engine: trainer`, and start `agnews-lora sweep --new`."
    )


def register(
    registry: "Registry",
    winner: Winner,
    base: BaseModel,
    corpus: Corpus,
    data: Mapping[str, str],
    logits: Callable[[], npt.NDArray[np.float32]],
) -> Version:
    """Register the winner under the alias `candidate`, unless its run has a version already.

    Args:
        data: where the rows come from, in words, for the model card.
        logits: gives `reload.reload` of the adapter on the validation split. Called only where a version is registered.

    Raises:
        BudgetError: its file holds more trainable parameters than the budget.
        AdapterError: its files are not what its record says.
        PromotionError: plain PEFT in a new process does not give the figures that the engine reported. Nothing is
            registered then.
    """
    known = registry.of_run(winner.run_id)
    if known is not None:
        # A process that was killed before it set the alias sets it now.
        if not known.aliases and "promotion" not in known.tags and registry.aliased(CANDIDATE) is None:
            registry.set_alias(CANDIDATE, known)
        return registry.version(known.number)
    record, count = read_record(winner.adapter), recount(winner.adapter)
    if count > winner.budget:
        found = breach(record.spec, record.shape, winner.budget, count)
        raise BudgetError(f"Cannot register {record.trial} of {winner.study}: its file has {found}.")
    answered = logits()
    require_reported(winner, record.trial, answered, corpus.validation.labels)
    answers = ReferenceAnswers.of(answered, corpus.validation)

    def write(path: Path, identity: "Model") -> Mapping[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            # MLflow keeps a folder's own name, so it must be the artifact's.
            artifacts = {name: Path(folder, name) for name in ARTIFACTS}
            shutil.copytree(winner.adapter, artifacts[ADAPTER])
            # Saved again rather than copied: the base's own files may need its configuration beside them.
            load_tokenizer(base.folder).save_pretrained(str(artifacts[TOKENIZER]))
            answers.write(artifacts[REFERENCE])
            _write_package(path, identity, artifacts, locator(base), record.labels)
        return {
            "trial": record.trial,
            "sweep": winner.sweep,
            "study": winner.study,
            "base": locator(base),
            "base_hub_id": base.hub_id,
            "base_revision": base.revision,
            "budget": str(winner.budget),
            "trainable_parameters": str(count),
            "data_digest": corpus.digest,
            "validation_accuracy": str(accuracy(answers.predicted, corpus.validation.labels)),
            "validation_macro_f1": str(macro_f1(answers.predicted, corpus.validation.labels)),
            "validation_rows": str(len(corpus.validation)),
            "data": json.dumps(data),
            **{f"{HASH_TAG}{name}": digest for name, digest in sorted(_all_hashes(path).items())},
        }

    version = registry.register(winner.run_id, write)
    registry.set_alias(CANDIDATE, version)
    return registry.version(version.number)


def locator(base: BaseModel) -> str:
    """What finds the base again on this machine, from any working directory: its name, or its folder."""
    pinned = base.name in KNOWN or base.name == f"{base.hub_id}@{base.revision}"
    return base.name if pinned else str(base.folder)


def _inside(base: str) -> str | None:
    """Path of a base's folder from the project, where it lies inside."""
    project = Path.cwd()
    return str(Path(base).relative_to(project)) if Path(base).is_relative_to(project) else None


def _write_package(
    folder: Path, identity: "Model", artifacts: Mapping[str, Path], base: str, labels: tuple[str, ...]
) -> None:
    """Save a pyfunc model from code: nothing is pickled.

    MLflow's own logging would load the model and score the example first; the reload in a new process has proved it.
    """
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    from agnews_lora.serving.predict import columns

    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # MLflow's bars would run across the live table
    label, *probabilities = columns(labels)
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=identity,
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        # `merged` is there to be overridden: MLflow takes no key at loading that was not saved.
        model_config={
            "base": base,
            "base_in_project": _inside(base),
            "sha256": hashes(artifacts),
            "merged": False,
        },
        # As URIs: MLflow decodes percent signs in a path.
        artifacts={name: path.resolve().as_uri() for name, path in artifacts.items()},
        # Without inputs: MLflow would turn a list into a frame without names, and then refuse it for that.
        signature=ModelSignature(
            outputs=Schema(
                [ColSpec(DataType.string, label), *(ColSpec(DataType.double, each) for each in probabilities)]
            )
        ),
        input_example=pd.DataFrame({"text": [EXAMPLE]}),
        # A local label (`+cpu`) is in no index.
        pip_requirements=[f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS],
    )


_SCORE_TAGS: Final = {
    "digest": "test_digest",
    "rows": "test_rows",
    "macro_f1": "test_macro_f1",
    "low": "test_accuracy_low",
    "high": "test_accuracy_high",
    "accuracy": "test_accuracy",  # the last: a version that has it has the others
}


@dataclass(frozen=True)
class TestScore:
    """Accuracy and macro-F1 on the test split, in fp32. low, high: Wilson's 95 % interval of the accuracy.

    digest: SHA-256 (hex) of the test rows.
    """

    __test__ = False  # not a test, whatever pytest makes of its name

    accuracy: float
    low: float
    high: float
    macro_f1: float
    rows: int
    digest: str

    def tags(self) -> dict[str, str]:
        return {tag: str(getattr(self, name)) for name, tag in _SCORE_TAGS.items()}

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.2%} (95 % interval {self.low:.2%} to {self.high:.2%}), macro-F1 "
            f"{self.macro_f1:.2%}, on {self.rows:,} rows."
        )


def recorded_score(version: Version) -> TestScore | None:
    """The test score in a version's tags, or None where it has none."""
    if "test_accuracy" not in version.tags:
        return None
    given = {name: version.tags[tag] for name, tag in _SCORE_TAGS.items()}
    shares = {name: float(given[name]) for name in ("accuracy", "low", "high", "macro_f1")}
    return TestScore(**shares, rows=int(given["rows"]), digest=given["digest"])


def registration_of(registry: "Registry", version: Version) -> "Registration":
    """A version for a sweep's result: its aliases, the findings of its last promotion, its test score."""
    from agnews_lora.search.results import Registration

    report: dict[str, Any] = json.loads(registry.report(version, f"{REPORT}.json") or "{}")
    score = recorded_score(version)
    return Registration(
        model=version.model,
        version=version.number,
        aliases=version.aliases,
        checks=tuple(report.get("checks", ())),
        test=asdict(score) if score else None,
    )
