"""An experiment: base model, data, training settings, and one adapter configuration. A file in `experiments/`."""

import os.path
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, GetPydanticSchema, Tag, model_validator
from pydantic_core import core_schema

from agnews_lora.adapters.spec import HEADS, PRESETS, TrialSpec
from agnews_lora.config.yaml import MAX_TEXT, Document, Settings, load, locate, shown
from agnews_lora.data.files import MAX_LABELS, MAX_NAME
from agnews_lora.data.rows import CLEANING
from agnews_lora.data.sources import DataSettings
from agnews_lora.training.interface import Precision, TrainSettings

FOLDER: Final = Path("experiments")  # below the working directory


def _one_of(names: Iterable[str]) -> GetPydanticSchema:
    return GetPydanticSchema(lambda source, handler: core_schema.literal_schema(list(names)))


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"Input should hold no control characters, but got {shown(text)}")
    return text


def _inside(path: str) -> str:
    """Refuse relative paths that leave the working directory: an experiment from elsewhere must not read any file."""
    if Path(os.path.normpath(path)).parts[:1] == ("..",):
        raise ValueError(
            f"Input should not lead out of the working directory, but got {shown(path)}. Copy the file into it, or "
            "give its absolute path"
        )
    return path


Preset = Annotated[str, _one_of(PRESETS)]
Head = Annotated[str, _one_of(HEADS)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_printable)]
FilePath = Annotated[Text, AfterValidator(_inside)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]  # above, it stands for no work that could ever be done
NewswireRows = Annotated[int, Field(ge=1, le=1_000_000)]  # written in memory, in a minute or so
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _label(value: object) -> object:
    """A label as YAML reads it, as the text that names it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else value


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Input should hold every name once, but has {', '.join(map(shown, twice))} more than once")
    return names


def _two_names(names: dict[str, str]) -> dict[str, str]:
    if not 2 <= (number := len(set(names.values()))) <= MAX_LABELS:
        raise ValueError(f"Input should name 2 to {MAX_LABELS:,} classes, but names {number:,}")
    return names


def _by_kind(kind: type, name: str, other: str) -> Discriminator:
    """Tells two alternatives apart by the value's type, so that a fault is judged by the one that was meant."""
    return Discriminator(lambda value: name if isinstance(value, kind) else other)


Names = Annotated[tuple[Text, ...], BeforeValidator(_tuple), Field(min_length=1), AfterValidator(_each_once)]
LabelName = Annotated[Text, BeforeValidator(_label), Field(max_length=MAX_NAME)]
LabelList = Annotated[
    tuple[LabelName, ...],
    BeforeValidator(_tuple),
    Field(min_length=2, max_length=MAX_LABELS),
    AfterValidator(_each_once),
]
LabelMapping = Annotated[dict[LabelName, LabelName], Field(max_length=100 * MAX_LABELS), AfterValidator(_two_names)]
LabelNames = Annotated[
    Annotated[LabelMapping, Tag("mapping")] | Annotated[LabelList | None, Tag("list")],
    _by_kind(dict, "mapping", "list"),
]
PathOrShare = Annotated[
    Annotated[FilePath, Tag("path")] | Annotated[Share, Tag("share")], _by_kind(str, "path", "share")
]
ColumnNames = Annotated[
    Annotated[Text, Tag("column")] | Annotated[Names, Tag("columns")], _by_kind(str, "column", "columns")
]
Cleaning = Annotated[str, _one_of(CLEANING)]


class LabelledData(Settings):
    """Labelled rows that somebody else wrote: which columns, which labels, and how many rows."""

    text: ColumnNames
    """Column of the text, or several whose values are joined by a space."""
    label: Text
    """Column of the label: words, whole numbers or booleans."""
    labels: LabelNames = None
    """Names of the classes in order (whole numbers count from 0, or from 1 where no training row has 0), or a mapping \
{value in the column: name}; the values themselves where it is not given."""
    clean: Cleaning | None = None
    """Rule by which texts are cleaned: `ag_news`; they stay as they are where it is not given."""
    allow_overlap: bool = False
    """Accept test rows that are training or validation rows as well."""
    rows: Count | None = None
    """Rows to use beside the test rows, each class in its share; all where it is not given."""
    train_rows: Count | None = None
    """Training rows to keep of those; all where it is not given."""
    test_rows: Count | None = None
    """Rows of the test split to use; all where it is not given."""


class FilesData(LabelledData):
    """Labelled rows in files: .csv, .tsv, .jsonl, .json (each also .gz) or .parquet."""

    source: Literal["files"]
    """Where the rows come from."""
    train: FilePath
    """File of the training rows: below the working directory, or absolute."""
    test: PathOrShare = 0.1
    """File of the test rows, or the share of the training file that is held out once, and not used by a search."""
    validation: PathOrShare = 0.1
    """File of the validation rows, or the share of the training file that is held out for validation."""
    columns: Names | None = None
    """Names of all columns in order, where CSV or TSV files have no header."""

    @model_validator(mode="after")
    def _columns_are_read(self) -> Self:
        files = [name.lower() for name in (self.train, self.test, self.validation) if isinstance(name, str)]
        if self.columns and not any(name.removesuffix(".gz").endswith((".csv", ".tsv")) for name in files):
            raise ValueError(f"columns names those of CSV or TSV files, but got {', '.join(files)}. Remove columns")
        return self


class HubSplits(Settings):
    """Splits of a data set on the hub."""

    train: Text = "train"
    """Split of the training rows."""
    test: Text | None = None
    """Split of the test rows; a share of the training split where it is not given."""
    validation: Text | None = None
    """Split of the validation rows; a share of the training split where it is not given."""


class HubData(LabelledData):
    """A data set from the Hugging Face hub, at one commit."""

    source: Literal["hub"]
    """Where the rows come from."""
    dataset: Text
    """Name on the hub, OWNER/NAME."""
    config: Text | None = None
    """Configuration of the data set, where it has several."""
    revision: Text | None = None
    """Branch, tag or commit; resolved to a commit once a project. The default branch where it is not given."""
    splits: HubSplits = HubSplits(test="test")
    """Its splits."""
    test: Share = 0.1
    """Share of the training split that is held out for testing, without a split for it."""
    validation: Share = 0.1
    """Share of the training split that is held out for validation, without a split for it."""


class NewswireData(Settings):
    """The corpus that the project writes itself."""

    source: Literal["newswire"]
    """Where the rows come from."""
    rows: NewswireRows
    """Rows of the train split to write, validation rows included."""
    train_rows: Count | None = None
    """Training rows to keep of those, each class in its share; all where it is not given."""
    test_rows: NewswireRows
    """Rows of the test split to write."""
    validation: Share = 0.1
    """Share of the train split that is held out for validation."""

    @model_validator(mode="after")
    def _rows_suffice(self) -> Self:
        left = self.rows - int(self.rows * self.validation)
        if self.train_rows is not None and self.train_rows > left:
            raise ValueError(
                f"train_rows should be at most the {left:_} of {self.rows:_} rows that validation leaves, but "
                f"got {self.train_rows:_}. Raise rows, or lower train_rows"
            )
        return self


class Adapter(Settings):
    """The adapter, and the classifier that trains with it."""

    targets: Preset
    """Preset of target modules."""
    rank: Count
    """LoRA r."""
    alpha: Annotated[float, Field(gt=0)]
    """LoRA alpha: the update is scaled by alpha / rank."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    head: Head = "full"
    """Which part of the classifier trains: all of it, or its last layer alone."""
    learning_rate: LearningRate
    """Peak of the schedule."""


class Training(Settings):
    """Training settings, shared by all trials of a sweep."""

    epochs: Count = 3
    """Passes over the training rows."""
    batch_size: Count = 32
    """Rows of a training batch."""
    eval_batch_size: Count = 64
    """Rows of an evaluation batch."""
    max_length: Annotated[int, Field(ge=3, le=1_000_000)] = 128
    """Tokens of a row, the two special ones included; what is longer is cut. At most the base's positions."""
    eval_every: Count = 500
    """Steps between two evaluations on the way."""
    eval_rows: Count = 2_000
    """Validation rows of the evaluations on the way; the last one uses them all."""
    log_every: Count = 10
    """Steps between two points of the training loss."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of all steps over which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm that the gradient of all trainable parameters is clipped to."""
    base_dropout: Probability = 0.0
    """Dropout inside the frozen base while training."""
    precision: Precision = "auto"
    """Number format of training; auto is bf16 where the device computes in it, else fp32."""


class Experiment(Document):
    """The experiment that `train` trains, and the baseline of a sweep."""

    base: Text
    """Base model: roberta-base, embedded:minilm, a directory (from the working directory), or a model of the hub by its
    id: owner/name, or owner/name@revision."""
    data: Annotated[FilesData | HubData | NewswireData, Field(discriminator="source")]
    """Rows to train, validate and test on."""
    adapter: Adapter
    """The one configuration that `train` trains: a sweep's baseline."""
    training: Training = Training()
    """How it is trained."""
    seed: Seed = 42
    """Seed of the split, the data order and the initial weights."""

    @property
    def spec(self) -> TrialSpec:
        """The adapter configuration."""
        return TrialSpec(**self.adapter.model_dump())

    @property
    def settings(self) -> TrainSettings:
        """The training settings that the engines receive."""
        return TrainSettings(**self.training.model_dump())

    @property
    def data_settings(self) -> DataSettings:
        """The data settings; keys that the source does not have are at their defaults."""
        given = self.data.model_dump()
        splits = {name: value for name, value in given.pop("splits", {}).items() if value is not None}
        if isinstance(text := given.get("text"), str):
            given["text"] = (text,)
        return DataSettings(**{**given, **splits})


def load_experiment(name: str | Path) -> Experiment:
    """The experiment of a name (`experiments/NAME.yaml` below the working directory), or of a path.

    Raises:
        ConfigError: no such file, or one with faults: all of them.
    """
    return load(Experiment, locate("experiment", str(name), [FOLDER]))
