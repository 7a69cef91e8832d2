"""How long rows are: a histogram of generated newswire under the real tokenizers, and random rows drawn from it."""

import csv
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from agnews_lora.data.tokens import TokenTable

LENGTHS = Path(__file__).resolve().parent.parent / "lengths.csv"
MAX_LENGTH = {"roberta": 128, "minilm": 80}  # tokens: as the experiments agnews and embedded cut rows
COLUMN = {"roberta": "roberta", "bert": "minilm"}  # of a family
ROWS = 10_000
SEED = 13


def make(tokenizers: dict[str, Path], path: Path = LENGTHS) -> None:
    """Count the tokens of `ROWS` rows of newswire and write the histogram: columns tokens, roberta, minilm.

    tokenizers: {column: folder with the tokenizer's files}. Token counts include the special tokens.

    Raises:
        BaseModelError: a folder without a tokenizer.
    """
    from agnews_lora.data import newswire

    texts = newswire.generate(ROWS, "train", SEED).texts
    counts = {}
    for column, folder in tokenizers.items():
        encoded = _tokenizer(folder)(list(texts), truncation=True, max_length=MAX_LENGTH[column])["input_ids"]
        counts[column] = Counter(map(len, encoded))
    beside = path.with_suffix(".partial")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tokens", *counts])
        for tokens in sorted(set().union(*counts.values())):
            writer.writerow([tokens, *(count[tokens] for count in counts.values())])
    beside.replace(path)


def _tokenizer(folder: Path) -> Any:
    """A folder's tokenizer; RoBERTa's is read from `vocab.json` and `merges.txt` where nothing else is there."""
    if (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file():
        from transformers import RobertaTokenizer

        return RobertaTokenizer.from_pretrained(str(folder))
    from agnews_lora.data.tokens import load_tokenizer

    return load_tokenizer(folder)


def draw(column: str, num_rows: int, seed: int, path: Path = LENGTHS) -> npt.NDArray[np.int64]:
    """(num_rows,) token counts, drawn from a column of the histogram; the same for the same arguments."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(int(row["tokens"]), int(row[column])) for row in csv.DictReader(file)]
    tokens, counts = np.array(rows, dtype=np.int64).T
    random = np.random.Generator(np.random.PCG64(seed))
    return random.choice(tokens, num_rows, p=counts / counts.sum())


def random_table(
    lengths: npt.NDArray[np.int64], vocabulary_size: int, pad_id: int, num_labels: int, seed: int
) -> "TokenTable":
    """Rows of these lengths; ids and labels are random, no id is `pad_id`."""
    from agnews_lora.data.tokens import TokenTable

    random = np.random.Generator(np.random.PCG64(seed))
    return TokenTable(
        ids=random.integers(pad_id + 1, vocabulary_size, lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        labels=random.integers(num_labels, size=len(lengths)),
        pad_id=pad_id,
        digest="",
    )
