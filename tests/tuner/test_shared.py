"""One scaled input for several layers: who gets it, and when it is made anew."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from san_peft.tuner.shared import SharedInput


class Maker:
    """Scales by two, and counts."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.count = x, 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return self.x * 2


def test_every_reader_gets_the_same_tensor_once():
    shared, x = SharedInput(3), torch.ones(2)
    make = Maker(x)
    first = [shared.fetch(reader, x, "state", make) for reader in (0, 2, 1)]
    assert first[0] is first[1] is first[2]
    assert make.count == 1
    assert shared.fetch(0, x, "state", make) is not first[0]
    assert make.count == 2


def test_nothing_is_held_once_all_have_read():
    shared, x = SharedInput(2), torch.ones(2)
    value = shared.fetch(0, x, None, Maker(x))
    alive = weakref.ref(value)
    shared.fetch(1, x, None, Maker(x))
    del value
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("change", ["tensor", "state", "version", "grad", "reader"])
def test_it_is_made_anew(change):
    shared, x = SharedInput(3), torch.ones(2)
    make = Maker(x)
    first = shared.fetch(0, x, "state", make)
    other, state, reader = x, "state", 1
    if change == "tensor":
        other = x.clone()
    elif change == "state":
        state = "neuron"
    elif change == "version":
        x.add_(1)
    elif change == "reader":
        reader = 0
    with torch.set_grad_enabled(change != "grad"):
        assert shared.fetch(reader, other, state, make) is not first


def test_regions_of_checkpointing_do_not_share():
    """A second region must be able to recompute what it reads without the first."""
    shared = SharedInput(2)
    x = torch.randn(3, requires_grad=True)
    seen = []

    def region(reader: int) -> torch.Tensor:
        scaled = shared.fetch(reader, x, None, lambda: x * 2)
        seen.append(scaled)
        return scaled.square()

    out = sum(checkpoint(region, reader, use_reentrant=False) for reader in (0, 1))
    assert seen[0] is not seen[1]
    out.sum().backward()
    torch.testing.assert_close(x.grad, 16 * x.detach())


def test_copies_hold_nothing():
    shared, x = SharedInput(2), torch.ones(2)
    shared.fetch(0, x, None, Maker(x))
    for other in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert (other.readers, other._held) == (2, None)
