"""A trial's checkpoint: tensors and progress, enough to go on as if nothing had been."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agnews_lora.errors import TrainingError
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import TrialPlan
from agnews_lora.training.multilora.slots import SlotState
from agnews_lora.training.multilora.trial_state import Progress

TENSORS = "slot.safetensors"
PROGRESS = "progress.json"


def write_checkpoint(plan: TrialPlan, progress: Progress, state: SlotState) -> Path:
    """Write a sealed checkpoint into the trial's folder, whole or not at all; its folder.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {f"{kind}/{name}": t for kind, own in state._asdict().items() for name, t in own.items()}
    written = {"spec": asdict(plan.spec), "seed": plan.seed, "progress": progress.as_dict()}
    with checkpoints.written(plan.trial, plan.folder, progress.step) as folder:
        save_file(tensors, folder / TENSORS)
        (folder / PROGRESS).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return checkpoints.folder_of(plan.folder, progress.step)


def read_checkpoint(plan: TrialPlan) -> tuple[Progress, SlotState]:
    """What `write_checkpoint` wrote to `plan.checkpoint`.

    Raises:
        TrainingError: not a checkpoint of this engine, damaged, or another trial's.
    """
    folder = plan.checkpoint
    assert folder is not None
    try:
        written = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        spec, seed, progress = written["spec"], written["seed"], Progress(**written["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"{folder} must be a checkpoint of engine multilora, but cannot be read as one ({error}); go on with the "
            "engine that wrote it, or start the trial again"
        ) from error
    if (spec, seed) != (asdict(plan.spec), plan.seed):
        raise TrainingError(
            f"{folder} is the checkpoint of another trial ({spec}, seed {seed}), not of {plan.trial} ({plan.spec}, "
            f"seed {plan.seed}); start the trial again"
        )
    kinds = [
        {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")}
        for kind in SlotState._fields
    ]
    return progress, SlotState(*kinds)
