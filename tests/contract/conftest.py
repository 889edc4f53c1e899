"""The grid of the contract: kinds of layer, precisions, with and without a shift."""

from __future__ import annotations

import pytest
import torch
from tests.contract.nets import KINDS, Kind


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["", "shift"])
def shift(request) -> bool:
    return request.param
