from pathlib import Path

import numpy as np
import pytest
import torch

from agnews_lora.adapters.base_models import resolve
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data import newswire
from agnews_lora.data.rows import Rows
from agnews_lora.data.tokens import tokenise
from agnews_lora.errors import PromotionError
from agnews_lora.serving import reload
from tests.serving.conftest import MAX_LENGTH, write_adapter
from tests.tiny import tiny_base

in_new_process = reload.reload  # before the fixtures replace it


def test_a_new_process_answers_as_this_one(tmp_path: Path) -> None:
    """On RoBERTa with a frozen part of the head: the file must carry it, since the base's own head is random."""
    base = resolve(str(tiny_base(tmp_path / "tiny-roberta", "roberta")))
    spec = TrialSpec(targets="all-linear", rank=2, alpha=4, dropout=0.1, learning_rate=1e-3, head="out_proj")
    adapter = write_adapter(tmp_path / "adapter", base, spec)
    rows = Rows(newswire.generate(80, "train", seed=3).texts, (0,) * 80)
    table = tokenise(rows, base.folder, MAX_LENGTH, tmp_path / "cache")
    here = reload.logits(adapter, base, table)
    there = in_new_process(adapter, base.name, table)
    assert there.shape == here.shape == (80, 4)
    assert here.std() > 0.1
    assert np.abs(there - here).max() <= 1e-5


def test_what_the_new_process_cannot_do_it_says_in_one_line(tmp_path: Path, world) -> None:
    with pytest.raises(PromotionError, match=r"Cannot load the adapter in a new process: .*nowhere"):
        in_new_process(world.good, "nowhere", world.corpus.validation)


def test_full_precision_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with reload.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
