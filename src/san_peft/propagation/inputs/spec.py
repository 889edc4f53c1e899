"""What a model says of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from san_peft.propagation.follow import Follow
from san_peft.propagation.norms import Norms
from san_peft.propagation.untouched import untouched

TOKENS = 6
"""Tokens of a derived text."""
LETTERS = 128
"""Vocabulary of a model that has none, and reads characters."""

Draft = dict[str, Any]
"""Keyword arguments that a model may or may not take."""


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function by name."""
    return inspect.signature(function).parameters


class ModelSpec:
    """Reads from a model what its inputs look like, and makes tensors on its device and in its dtype.

    Attributes:
        model: The model.
        config: Its configuration, or `None`.
        accepted: The parameters of its forward method by name.
        device: Device of its parameters; the CPU for a model on the meta device.
        dtype: Dtype of its first floating-point parameter.
        error: What the model raised last in `run`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.config: Any = getattr(model, "config", None)
        self.accepted = parameters(model.forward)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.is_meta = device.type == "meta"
        self.device = torch.device("cpu") if self.is_meta else device
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.error: Exception | None = None
        self._generator = torch.Generator("cpu").manual_seed(0)

    @cached_property
    def sections(self) -> list[Any]:
        """The configuration and those within it, the outermost first."""
        found, todo = [], [self.config]
        while todo:
            config = todo.pop(0)
            if hasattr(config, "model_type") and not any(config is other for other in found):
                found.append(config)
                todo += vars(config).values()
        return found

    def find(self, *names: str, section: str | None = None, default: Any = None) -> Any:
        """Returns the first value that the configuration has under one of some names.

        Args:
            names: Names, the most telling first.
            section: Name of the part of the configuration to look into first, such as `vision_config`.
            default: Result where there is none.
        """
        first = getattr(self.config, section, None) if section else None
        for config in (first, *self.sections):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def required(self, given: Iterable[str]) -> list[str]:
        """Returns the parameters of forward that have no default and are not given."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        free = [name for name, p in self.accepted.items() if p.default is p.empty and p.kind not in kinds]
        return [name for name in free if name not in given]

    # ---------------------------------------------------------------- tensors

    def noise(self, *shape: int) -> Tensor:
        """Returns normally distributed numbers, the same for every model."""
        return torch.randn(shape, generator=self._generator, device="cpu").to(self.device, self.dtype)

    def numbers(self, values: Any) -> Tensor:
        """Returns integers."""
        return torch.tensor(values, device=self.device, dtype=torch.long)

    def ones(self, *shape: int) -> Tensor:
        """Returns a mask that hides nothing."""
        return torch.ones(shape, device=self.device, dtype=torch.long)

    def words(self, count: int = TOKENS, text: Any = None) -> list[int]:
        """Returns token ids spread over the vocabulary; no id with a meaning of its own, such as padding, is one."""
        size = getattr(text, "vocab_size", None) or self.find("vocab_size", section="text_config") or LETTERS
        special, found = set(self.special()), []
        for number in range(1, count + 1):
            word = number * size // (count + 1)
            while (word in special or word in found) and word < size - 1:
                word += 1
            found.append(word)
        return found

    def special(self) -> Iterator[int]:
        """Yields the token ids that the configuration names."""
        for config in self.sections:
            for name in vars(config):
                if name.endswith(("_token_id", "_token_ids", "_token_index")):
                    value = getattr(config, name)
                    yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int)

    # ---------------------------------------------------------------- trying

    def run(self, function: Callable[..., Any], inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
        """Calls the model, or a method of it, on a draft and leaves no mark.

        Returns:
            What it returned, or `None` where it raised; `error` then holds why.
        """
        with ExitStack() as stack:
            stack.enter_context(untouched(self.model))
            stack.enter_context(torch.no_grad())
            if self.is_meta:  # as the trace does: numbers are real, weights are not
                stack.enter_context(Follow(self.model, Norms(self.model, {}), {}))
            try:
                return function(**inputs) if isinstance(inputs, Mapping) else function(*inputs)
            except Exception as error:
                self.error = error
                return None
