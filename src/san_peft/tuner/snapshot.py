"""Restores a model if adding an adapter fails."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

CONTAINERS = (dict, OrderedDict, list, set)
"""Containers whose contents are recorded; subclasses with state of their own are left alone."""


class Snapshot:
    """Records the modules of a model, without copying a tensor, so that they can be restored.

    Covers what adding an adapter changes: submodules, parameters and buffers (as objects), hooks, classes, modes,
    `requires_grad`, and weights that an initialisation such as PiSSA replaces through `weight.data`.

    Args:
        model: The model.
        others: Further objects whose attributes are recorded, such as tuners.
    """

    def __init__(self, model: nn.Module, *others: Any) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._classes = [(module, type(module)) for module in model.modules()]
        for one in (*model.modules(), *others):
            self._record(vars(one))
        self._parameters = [
            (p, p.requires_grad, p.data if type(p) is nn.Parameter else None) for p in model.parameters()
        ]

    def _record(self, value: Any) -> None:
        if isinstance(value, tuple):
            inside: Any = value
        elif type(value) in CONTAINERS and id(value) not in self._contents:
            self._contents[id(value)] = (value, copy.copy(value))
            inside = list(value.values()) if isinstance(value, dict) else list(value)
        else:
            return
        for one in inside:
            self._record(one)

    def restore(self) -> None:
        """Restores everything that was recorded, in the same objects."""
        for module, kind in self._classes:
            module.__class__ = kind
        for value, contents in self._contents.values():
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
        for parameter, requires_grad, data in self._parameters:
            if data is not None and parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(requires_grad)
