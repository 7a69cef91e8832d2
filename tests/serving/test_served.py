from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agnews_lora.errors import GateError, RegistryError
from agnews_lora.serving.package import Package
from agnews_lora.serving.record import FIXED_ROWS, read_fixed_rows, read_gate_record
from agnews_lora.serving.served import require_same, serve
from agnews_lora.tracking.registry import Registry, Version
from tests.serving.conftest import World

Enter = Callable[[Path], Version]


@pytest.fixture
def package(registry: Registry, world: World, enter: Enter) -> Package:
    return Package(registry.folder(enter(world.good)))


@pytest.mark.parametrize("merged", [False, True])
def test_a_version_answers_as_when_it_was_registered(package: Package, merged: bool) -> None:
    served = serve(package, "version 1 of small", merged)
    assert served.num_rows == 64
    assert 0 <= served.difference <= 1e-4


def test_the_rows_of_the_record_are_kept_with_it(package: Package, world: World) -> None:
    rows, record = read_fixed_rows(package.gate), read_gate_record(package.gate)
    whole = world.corpus.validation
    assert len(rows) == len(record.rows) == 64 and rows.pad_id == whole.pad_id
    for position, row in enumerate(record.rows):
        assert np.array_equal(rows.row(position), whole.row(row))


def test_another_answer_is_not_served(package: Package) -> None:
    record = read_gate_record(package.gate)
    assert require_same(record, record.logits + np.float32(5e-5), "it", False) == pytest.approx(5e-5, rel=0.1)
    with pytest.raises(GateError, match=r"^it must answer .* within 0.0001, but 0 of 64 .* 0.001; serve another one"):
        require_same(record, record.logits + np.float32(1e-3), "it", False)
    with pytest.raises(GateError, match=r"but 64 of 64 fixed rows get another label .*; serve it without --merged$"):
        require_same(record, -record.logits, "it", True)
    with pytest.raises(GateError, match=r"the largest difference is nan"):
        require_same(record, record.logits * np.float32("nan"), "it", True)


def test_close_logits_with_another_label_are_not_served(package: Package) -> None:
    record = read_gate_record(package.gate)
    tied = np.zeros_like(record.logits)
    tied[:, 0] = 1e-6
    turned = np.zeros_like(tied)
    turned[:, 1] = 1e-6
    with pytest.raises(GateError, match=r"64 of 64 fixed rows get another label"):
        require_same(replace(record, logits=tied), turned, "it", False)


def test_a_version_without_its_rows_is_refused(package: Package) -> None:
    (package.gate / FIXED_ROWS).unlink()
    with pytest.raises(RegistryError, match=r"gate_rows.safetensors is not there or not whole; register another"):
        serve(package, "it", False)
