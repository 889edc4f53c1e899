"""Reads from a model what inputs it expects."""

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
"""Number of tokens of a derived text."""
LETTERS = 128
"""Vocabulary size of a character-level model without one in its config."""

Draft = dict[str, Any]
"""Keyword arguments to try on a model."""


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function by name."""
    return inspect.signature(function).parameters


class ModelSpec:
    """Reads the expected inputs of a model, and creates tensors on its device and in its dtype.

    Attributes:
        model: The model.
        config: Its config, or `None`.
        accepted: Parameters of its forward method, by name.
        device: Device of its parameters; the CPU for a model on the meta device.
        dtype: Dtype of its first floating-point parameter.
        error: Last exception in `run`.
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
        """The config and its nested configs, outermost first."""
        found, todo = [], [self.config]
        while todo:
            config = todo.pop(0)
            if hasattr(config, "model_type") and not any(config is other for other in found):
                found.append(config)
                todo += vars(config).values()
        return found

    def find(self, *names: str, section: str | None = None, default: Any = None) -> Any:
        """Returns the first config value under one of several names.

        Args:
            names: Names in order of preference.
            section: Nested config to search first, such as `vision_config`.
            default: Value to return if there is none.
        """
        first = getattr(self.config, section, None) if section else None
        for config in (first, *self.sections):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def required(self, given: Iterable[str]) -> list[str]:
        """Returns the parameters of forward that have no default and are not in `given`."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        free = [name for name, p in self.accepted.items() if p.default is p.empty and p.kind not in kinds]
        return [name for name in free if name not in given]

    # ---------------------------------------------------------------- tensors

    def noise(self, *shape: int) -> Tensor:
        """Returns normally distributed numbers from a fixed seed."""
        return torch.randn(shape, generator=self._generator, device="cpu").to(self.device, self.dtype)

    def numbers(self, values: Any) -> Tensor:
        """Returns an integer tensor."""
        return torch.tensor(values, device=self.device, dtype=torch.long)

    def ones(self, *shape: int) -> Tensor:
        """Returns a mask of ones."""
        return torch.ones(shape, device=self.device, dtype=torch.long)

    def words(self, count: int = TOKENS, text: Any = None) -> list[int]:
        """Returns token ids spread over the vocabulary, without special tokens such as padding."""
        size = getattr(text, "vocab_size", None) or self.find("vocab_size", section="text_config") or LETTERS
        special, found = set(self.special()), []
        for number in range(1, count + 1):
            word = number * size // (count + 1)
            while (word in special or word in found) and word < size - 1:
                word += 1
            found.append(word)
        return found

    def special(self) -> Iterator[int]:
        """Yields the special token ids in the config."""
        for config in self.sections:
            for name in vars(config):
                if name.endswith(("_token_id", "_token_ids", "_token_index")):
                    value = getattr(config, name)
                    yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int)

    # ---------------------------------------------------------------- trial runs

    def run(self, function: Callable[..., Any], inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
        """Calls the model, or a method of it, on a draft without side effects.

        Returns:
            The result, or `None` if it raised an exception, which is then in `error`.
        """
        with ExitStack() as stack:
            stack.enter_context(untouched(self.model, threads=1))
            stack.enter_context(torch.no_grad())
            if self.is_meta:  # as in `trace`: index tensors are real, weights are not
                stack.enter_context(Follow(self.model, Norms(self.model, {}), {}))
            try:
                return function(**inputs) if isinstance(inputs, Mapping) else function(*inputs)
            except Exception as error:
                self.error = error
                return None
