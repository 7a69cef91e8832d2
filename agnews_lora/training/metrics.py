"""Scores of a classifier, and its logits over a token table: one definition for training, promotion and serving."""

import base64
from collections.abc import Callable, Iterable, Sequence
from math import isfinite, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from agnews_lora.data.tokens import TokenTable

Watch = Callable[[Sequence[list[int]]], Iterable[list[int]]]


def accuracy(predicted: npt.NDArray[np.integer], labels: npt.NDArray[np.integer]) -> float:
    """Compute the share of predictions [rows] that equal the label."""
    return float((predicted == labels).mean())


def macro_f1(predicted: npt.NDArray[np.integer], labels: npt.NDArray[np.integer]) -> float:
    """Compute the mean over the classes that occur (in labels or predictions) of F1 = 2·TP / (2·TP + FP + FN).

    It is scikit-learn's `f1_score(labels, predicted, average="macro")`.
    """
    num_classes = int(max(predicted.max(), labels.max())) + 1
    true_positives = np.bincount(labels[predicted == labels], minlength=num_classes)
    counts = np.bincount(predicted, minlength=num_classes) + np.bincount(labels, minlength=num_classes)
    return float(np.mean(2 * true_positives[counts > 0] / counts[counts > 0]))


def packed(right: npt.NDArray[np.bool_]) -> str:
    """Write which rows are right [rows] as text, a bit a row: base64 of `np.packbits`."""
    return base64.b64encode(np.packbits(right).tobytes()).decode("ascii")


def unpacked(text: str, rows: int | None = None) -> npt.NDArray[np.bool_]:
    """Read which rows are right [rows] from what `packed` wrote; without a number, with up to 7 wrong ones behind."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=rows).astype(np.bool_)


def accuracy_interval(
    share: float, num_rows: int, seed_variance: float = 0.0, confidence: float = 0.95
) -> tuple[float, float]:
    """Compute (low, high), the Wilson score interval of an accuracy (Wilson 1927).

    The mean of runs over several seeds varies with the rows, by p(1 - p) / n as a single run does, since all runs are
    scored on the same rows, and with the seeds. Its interval is Wilson's for as many rows as would give the sum of both
    variances: the effective sample size of Korn and Graubard (Survey Methodology 24(2), 1998).

    Args:
        share: p, correct answers among `num_rows` rows, n.
        seed_variance: of the mean over seeds: the sample variance of the runs by their number.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    spread = share * (1 - share)
    rows = spread / (spread / num_rows + seed_variance) if spread else num_rows
    centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z * sqrt(spread / rows + z**2 / (4 * rows**2)) / (1 + z**2 / rows)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_cross_entropy(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> float:
    """Compute the mean of -log softmax(logits)[label], in nats; logits [rows, classes], labels [rows]."""
    exact = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # the caller judges a loss that is not finite
        return float(np.mean(np.logaddexp.reduce(exact, axis=-1) - exact[np.arange(len(labels)), labels]))


def require_finite(name: str, value: float, step: int, spec: TrialSpec) -> None:
    """Check a loss or a gradient's norm.

    Raises:
        TrainingError: it is not finite.
    """
    if not isfinite(value):
        raise TrainingError(
            f"Cannot continue training {spec}: the {name} became {value} by step {step}. Lower the learning rate "
            "or alpha."
        )


def by_length(lengths: npt.NDArray[np.integer], batch_size: int) -> list[list[int]]:
    """Group positions 0..n-1 into batches of like length, the longest first: little padding, an early memory peak."""
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]


def predict_logits(
    model: "torch.nn.Module",
    table: "TokenTable",
    rows: Sequence[int],
    batch_size: int,
    device: "torch.device",
    watch: Watch = iter,
) -> npt.NDArray[np.float32]:
    """Compute logits [len(rows), classes] of a Hugging Face or PEFT classifier on rows of a table, in their order.

    Args:
        model: on `device`, in evaluation mode; it computes in its own precision.
        rows: ids of the table's rows, at least one.
        batch_size: rows.
        watch: passes the batches on, and so sees how far it is.
    """
    import torch

    ids = np.asarray(rows)
    logits: npt.NDArray[np.float32] | None = None
    with torch.inference_mode():
        for positions in watch(by_length(table.lengths[ids], batch_size)):
            input_ids, attention_mask, _ = table.padded(ids[positions].tolist())
            output = model(
                input_ids=torch.from_numpy(input_ids).to(device),
                attention_mask=torch.from_numpy(attention_mask).to(device),
            ).logits.float()
            if logits is None:
                logits = np.empty((len(ids), output.shape[-1]), dtype=np.float32)
            logits[positions] = output.cpu().numpy()
    assert logits is not None, "rows must not be empty"
    return logits
