"""What passes between the command and the processes that it measures in: plain values, kept as JSON."""

from dataclasses import dataclass
from math import lcm
from typing import Literal

ROBERTA_BASE, MINILM = "roberta-base", "minilm"  # the models whose shape is known
MIXTURE_SIZE = 4  # different configurations that every peer trains in the same proportions


@dataclass(frozen=True)
class Peer:
    """What is measured. slots: trials at once (1 for the Trainer). bf16: asked of the Trainer; the engine chooses."""

    kind: Literal["trainer", "multilora"]
    slots: int = 1
    bf16: bool = False

    def __str__(self) -> str:
        if self.kind == "trainer":
            return f"Trainer + PEFT, {'bf16' if self.bf16 else 'fp32'}"
        return f"multilora, K = {self.slots}"

    @property
    def num_trials(self) -> int:
        """Trials of a round: the whole mixture, and full slots throughout."""
        return lcm(self.slots, MIXTURE_SIZE)


@dataclass(frozen=True)
class Setup:
    """The machine and the model. matrix_parameters: of the encoder layers. lengths: column of the histogram."""

    model: str
    matrix_parameters: int
    lengths: str
    device_type: str
    device: str
    bf16: bool
    python: str
    torch: str
    transformers: str
    peft: str


@dataclass(frozen=True)
class Task:
    """One peer in one round. folder: holds the model's files. started: Unix time at which the process was started.

    steps: of a trial. warmup_steps: the first of them, left out of the training time.
    """

    peer: Peer
    setup: Setup
    folder: str
    batch_size: int
    eval_batch_size: int
    steps: int
    warmup_steps: int
    eval_rows: int
    started: float


@dataclass(frozen=True)
class Measurement:
    """What a process measured.

    rows, tokens: trained after the warm-up steps, over all trials; tokens without padding. train_seconds: in which they
    were, evaluations left out. product_before, product_after: bf16 matrix products in FLOP/s. wall_seconds: of all
    trials, from building the first to the export of the last. start_up_seconds: from the start of the process to the
    first trial that is measured.
    """

    rows: int
    tokens: int
    train_seconds: float
    product_before: float
    product_after: float
    num_trials: int
    wall_seconds: float
    peak_memory_bytes: int
    start_up_seconds: float
