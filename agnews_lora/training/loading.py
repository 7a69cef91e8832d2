"""Token tables as Trainer reads them: whole padded batches, cut before it starts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from agnews_lora.data.tokens import TokenTable
from agnews_lora.training.data_order import WIDTH_STEP
from agnews_lora.training.evaluation import by_length


class TableRows(Dataset[Any]):
    """Some rows of a token table. Positions are those in `rows`, not the table's."""

    def __init__(self, table: TokenTable, rows: Sequence[int]) -> None:
        self.table = table
        self.rows = np.asarray(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch: input_ids and attention_mask (b, longest), labels (b,)."""
        input_ids, attention_mask, labels = self.table.padded(self.rows[positions].tolist(), WIDTH_STEP)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
        }


class PrecutTrainer(Trainer):
    """Trainer over batches that are cut already: the shared data order in training, like lengths in evaluation."""

    def __init__(self, *args: Any, train_batches: list[list[int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_batches = train_batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_dataset, self.train_batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        lengths = eval_dataset.table.lengths[eval_dataset.rows]
        return self._loader(eval_dataset, by_length(lengths, self.args.per_device_eval_batch_size))

    def _loader(self, dataset: Any, cut: list[list[int]]) -> DataLoader[Any]:
        # A generator of its own: a loader draws a number at each start, and dropout must not depend on how often.
        return DataLoader(dataset, batch_sampler=cut, collate_fn=lambda batch: batch, generator=torch.Generator())
