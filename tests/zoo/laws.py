"""What must hold of SAN on every model, whatever its architecture.

A law gets a `Subject` and raises an `AssertionError` that says what is wrong, or `VacuousLaw` where it says nothing of
the model, such as of one that has no exact edge.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.contract.nets import disturb
from tests.zoo.folding import fold_attention, fold_layer
from tests.zoo.table import Architecture
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_map

from san_peft import PropagationGraph, SanConfig, SanLayer, trace
from san_peft.errors import MergeError
from san_peft.propagation.inputs import derive_inputs
from san_peft.propagation.inputs.spec import ModelSpec
from san_peft.propagation.trace import is_adaptable

PREFIX = "base_model.model."


class VacuousLaw(Exception):
    """A law says nothing of this model; the message says why."""


class Subject:
    """A small model of an architecture, with what is computed of it once."""

    def __init__(self, architecture: Architecture) -> None:
        self.name = architecture.name
        self.given = None if architecture.inputs is None else architecture.inputs()
        self.model = without_dropout(alive(architecture.build()))
        assert all(x.isfinite().any() for x in self.computed(self.base())), "the frozen model gives no finite number"

    @cached_property
    def inputs(self) -> Any:
        """Example inputs, derived from the model unless the table gives them."""
        return derive_inputs(self.model) if self.given is None else self.given

    @cached_property
    def graph(self) -> PropagationGraph:
        """The traced graph."""
        return trace(self.model, self.given)

    @cached_property
    def wide(self) -> torch.dtype:
        """float64, or float32 for a model that cannot compute in float64."""
        try:
            found = self.computed(self.base(torch.float64))
        except RuntimeError:  # such as one that makes float32 tensors on the way
            return torch.float32
        expected = self.computed(self.base())
        return torch.float64 if gap([x.float() for x in found], expected) < 1e-2 else torch.float32

    @cached_property
    def rounding(self) -> float:
        """What outputs may be off by: far more than rounding, in the type that the model computes in."""
        if self.wide == torch.float32:
            return 1e-4
        base, before = self.base(torch.float64), self.computed(self.base(torch.float64))
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(1 + 1e-12)
        return 2e-5 if gap(self.computed(base), before) > 1e-9 else 1e-9  # it rounds to float32 on the way

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns a copy of the frozen model in eval mode."""
        return copy.deepcopy(self.model).to(dtype)

    def config(self, **options: Any) -> SanConfig:
        """Returns a configuration as a user writes it; with the traced graph where inputs are given."""
        if self.given is not None:
            options.setdefault("propagation", self.graph)
        return SanConfig(**options)

    def adapted(self, **options: Any) -> PeftModel:
        """Returns the model with an adapter at its start, in eval mode, in the wide type."""
        config = SanConfig(**{"propagation": self.graph, **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(self.base(self.wide), config, autocast_adapter_dtype=False)
        return model.to(self.wide).eval()

    def trained(self) -> PeftModel:
        """Returns the model with an adapter whose vectors are random, as after a training."""
        model = self.adapted(shift=True)
        disturb(model, size=0.1)
        return model

    def outputs(self, model: nn.Module, training: bool = False) -> list[Tensor]:
        """Returns all floating-point tensors that a model gives on the inputs, with the same random state."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        moved = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, self.inputs)
        torch.manual_seed(0)
        out = model.train(training)(**moved) if isinstance(moved, dict) else model.train(training)(*moved)
        return [x for x in tree_flatten(plain(out))[0] if isinstance(x, Tensor) and x.is_floating_point()]

    @torch.no_grad()
    def computed(self, model: nn.Module, training: bool = False) -> list[Tensor]:
        """Returns the outputs without a graph of gradients."""
        return self.outputs(model, training)


def plain(out: Any) -> Any:
    """Returns an output as containers that torch knows; models' output classes are mappings."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "items"):
        return {key: plain(value) for key, value in out.items()}
    if isinstance(out, list | tuple):
        return [plain(value) for value in out]
    return plain(vars(out)) if hasattr(out, "__dataclass_fields__") else out


@torch.no_grad()
def alive(model: nn.Module) -> nn.Module:
    """Gives constant and tiny parameters values that matter: biases, affine weights of norms, layer scales."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        size = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        if parameter.dim() > 1 and parameter.std() < size / 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        elif parameter.dim() == 1 and parameter.max() == parameter.min():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets all rates of dropout and of dropped paths to zero, and batch norms to their statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train = _stay
        _no_rates(module)
    for config in ModelSpec(model).sections:
        _no_rates(config)
    return model


def _no_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
            setattr(holder, name, 0.0)


def _stay(mode: bool = True) -> None:
    """Keeps a batch norm in eval mode, where it uses its running statistics."""


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest difference of some outputs, relative to the size of the expected ones."""
    assert len(found) == len(expected), f"{len(found)} outputs instead of {len(expected)}"
    assert expected, "no outputs"
    return max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference of two tensors, relative to the size of the second; equal infinities are equal."""
    assert a.shape == b.shape, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}"
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    size = b[b.abs() < 1e30].abs().max().clamp(min=1e-12)  # what masks logits is larger
    return float(((a - b).abs().masked_fill(same, 0).max() / size).nan_to_num(nan=float("inf")))


def effect(subject: Subject, model: nn.Module) -> float:
    """Returns how much an adapter changes the outputs; it has to, or a law compares nothing."""
    size = gap(subject.computed(model), subject.computed(subject.base(subject.wide)))
    assert size > 100 * subject.rounding, f"the adapter changes nothing ({size:.1e})"
    return size


# ---------------------------------------------------------------- laws


def starts_as_the_frozen_model(subject: Subject) -> None:
    """At the start the outputs are those of the frozen model bit for bit, wired from nothing but the model."""
    # of frozen weights, as torch multiplies strided tensors in another order where one of them is trained
    expected = subject.computed(subject.base().requires_grad_(False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(subject.base(), subject.config()).eval()
    assert model.base_model.propagation_graph.edges or not subject.graph.select("all").edges, "no edge is wired"
    assert gap(subject.computed(model), expected) == 0, "other outputs in eval mode"


def trains_what_lora_trains(subject: Subject) -> None:
    """A step gives a scale a gradient where LoRA on its layer gets one, and elsewhere only where it propagates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = get_peft_model(subject.base(), subject.config(propagation=subject.graph))
        wrapped = [n.removeprefix(PREFIX) for n, m in own.named_modules() if isinstance(m, SanLayer) and m.san_scale]
        names = [n for n in wrapped if getattr(subject.model.get_submodule(n), "groups", 1) == 1]
        try:
            lora = get_peft_model(subject.base(), LoraConfig(r=2, target_modules=names))
            names = {n.removeprefix(PREFIX) for n, m in lora.named_modules() if isinstance(m, LoraLayer)} & set(names)
        except ValueError as error:
            raise VacuousLaw(f"LoRA does not take these layers: {error}") from error
    theirs = _trained(subject, lora, ".lora_B.default")
    if isinstance(theirs, str):
        raise VacuousLaw(f"LoRA does not train: {theirs}")
    ours = _trained(subject, own, ".san_scale.default")
    assert not isinstance(ours, str), f"does not train, as LoRA does: {ours}"
    fed = {edge.anterior for edge in own.base_model.propagation_graph.edges}  # these get one from their readers too
    frozen = subject.base().requires_grad_(False)
    for name in names:
        frozen.get_submodule(name).requires_grad_(True)
    reached = {name.rpartition(".")[0] for name in _trained(subject, frozen, "")}  # a bias where the input is zero
    more, less = (ours & names) - theirs - fed - reached, (theirs & names) - ours
    assert not less, f"no gradient, as LoRA has: {sorted(less)[:3]} ({len(less)} of {len(names)})"
    assert not more, f"a gradient where LoRA has none: {sorted(more)[:3]} ({len(more)} of {len(names)})"


def _trained(subject: Subject, model: nn.Module, mark: str) -> set[str] | str:
    """Returns the layers whose vectors or matrices get a gradient in a step, or why there is no step."""
    try:
        sum(x.square().mean() for x in subject.outputs(model, training=True) if x.requires_grad).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    grads = {name: p.grad for name, p in model.named_parameters() if mark in name and p.grad is not None}
    found = (name.partition(mark)[0] if mark else name for name, grad in grads.items() if grad.any())
    return {name.removeprefix(PREFIX) for name in found}


def hosts_lora(subject: Subject) -> None:
    """Over LoRA with default targets it is the frozen model at the start, and a step trains matrices of LoRA."""
    expected = subject.computed(subject.base())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(subject.base(), subject.config(propagation=subject.graph, inner=LoraConfig(r=2)))
    assert gap(subject.computed(model), expected) == 0, "other outputs in eval mode"
    hosted = _trained(subject, model, ".base_layer.lora_B.default")
    if isinstance(hosted, str):
        alone = _trained(
            subject, get_peft_model(subject.base(), LoraConfig(r=2, target_modules="all-linear")), ".lora_"
        )
        if isinstance(alone, str):
            raise VacuousLaw(f"LoRA does not train either: {alone}")
    assert not isinstance(hosted, str), f"does not train: {hosted}"
    if not hosted:
        names = [n.removeprefix(PREFIX) for n, m in model.named_modules() if isinstance(m, SanLayer) and m.host]
        if not _trained(subject, get_peft_model(subject.base(), LoraConfig(r=2, target_modules=names)), ".lora_B."):
            raise VacuousLaw("no layer that LoRA fits gets a gradient from LoRA alone either")
    assert hosted, "no matrix gets a gradient"


def folds(subject: Subject) -> None:
    """In float64 the adapted model is the frozen one with weights folded by hand; so are merged and unloaded ones."""
    model = subject.trained()
    expected = subject.computed(model)
    size = effect(subject, model)
    tolerance = max(subject.rounding, 1e-4 * size)
    made_anew = any(is_parametrized(module) for module in subject.model.modules())
    by_hand = 0.0 if made_anew else gap(subject.computed(folded(subject, model)), expected)
    try:
        model.merge_adapter()
    except MergeError as error:
        assert gap(subject.computed(model), expected) == 0, "a merge that is refused changes something"
        if made_anew or by_hand >= tolerance:
            raise VacuousLaw(f"a weight is made anew in every forward pass: {error}") from error
        raise
    found = gap(subject.computed(model), expected)
    assert found < tolerance, f"merged differs by {found:.1e}, effect {size:.1e}"
    assert by_hand < tolerance, f"weights folded by hand differ by {by_hand:.1e}, effect {size:.1e}"
    model.unmerge_adapter()
    assert gap(subject.computed(model), expected) == 0, "unmerged is not as before"
    found = gap(subject.computed(model.merge_and_unload()), expected)
    assert found < tolerance, f"unloaded differs by {found:.1e}, effect {size:.1e}"


def folded(subject: Subject, adapted: PeftModel) -> nn.Module:
    """Returns the frozen model with the scales, shifts and propagated scales of an adapter in its weights."""
    base = subject.base(subject.wide)
    layers = {n.removeprefix(PREFIX): m for n, m in adapted.named_modules() if isinstance(m, SanLayer)}
    inputs: dict[str, Any] = {}
    for edge in adapted.base_model.propagation_graph.edges:
        scale = layers[edge.anterior].get_scale("default").detach()
        index = torch.as_tensor(edge.channels.index)
        reached = torch.where(index >= 0, scale[index.clamp(min=0)], torch.ones_like(scale[:1]))
        inputs[edge.posterior] = inputs.get(edge.posterior, 1.0) * reached
    with torch.no_grad():
        for name, layer in layers.items():
            module, vectors = base.get_submodule(name), (layer.get_scale("default"), layer.get_shift("default"))
            if isinstance(module, nn.MultiheadAttention):
                fold_attention(module, *vectors, inputs.get(name))
            else:
                fold_layer(module, *vectors, inputs.get(name))
    return base


def reloads(subject: Subject) -> None:
    """An adapter that was saved gives the same outputs after it was loaded onto the frozen model."""
    model = subject.trained()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(subject.base(subject.wide), folder, autocast_adapter_dtype=False)
    assert gap(subject.computed(again), subject.computed(model)) == 0, "other outputs after loading"


def training_mode_changes_nothing(subject: Subject) -> None:
    """Without dropout the adapted model gives in training mode what it gives in eval mode, as the frozen one does."""
    base = subject.base(subject.wide)
    before = subject.computed(base)
    try:
        after = subject.computed(base, training=True)
    except (RuntimeError, ValueError) as error:
        raise VacuousLaw(f"the frozen model does not run in training mode: {error}") from error
    if [x.shape for x in before] != [x.shape for x in after] or gap(after, before) > subject.rounding:
        raise VacuousLaw("the frozen model computes something else in training mode")
    model = subject.trained()
    found = gap(subject.computed(model, training=True), subject.computed(model))
    size = effect(subject, model)
    assert found < max(subject.rounding, 1e-4 * size), f"differs by {found:.1e}, effect {size:.1e}"


def minus_one_undoes_exact_edges(subject: Subject) -> None:
    """With exponent -1 a scale that only closed exact edges carry changes nothing."""
    edges = [edge for edge in subject.graph.select("exact").edges if edge.closed]
    if not edges:
        raise VacuousLaw("no exact edge has its channels to itself")
    graph = subject.graph.with_edges(edges)
    model = subject.adapted(propagation=graph, target_modules=[edge.anterior for edge in edges], exponent=-1.0)
    carried = {edge.anterior: torch.as_tensor(edge.channels.index) for edge in edges}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".san_scale." in name:
                index = carried[name.partition(".san_scale.")[0].removeprefix(PREFIX)]
                channels = index[index >= 0].unique()
                parameter[channels] += (torch.rand(len(channels), generator=generator) * 0.5).to(parameter.dtype)
    before = subject.computed(subject.base(subject.wide))
    found = gap(subject.computed(model), before)
    with model.base_model.set_mode("neuron"):
        alone = gap(subject.computed(model), before)
    assert alone > 100 * subject.rounding, f"without propagation the scales change nothing either ({alone:.1e})"
    assert found < subject.rounding, f"the outputs change by {found:.1e}, without propagation by {alone:.1e}"


def explains_every_layer(subject: Subject) -> None:
    """A layer without edges into it has a barrier, or reads what no adaptable layer wrote."""
    explained = {edge.posterior for edge in subject.graph.edges} | {b.layer for b in subject.graph.barriers}
    silent = [name for name in _fed(subject, explained) if name not in explained]
    assert not silent, f"neither edge nor barrier at {', '.join(silent[:3])} ({len(silent)})"
    layers = {name for name, module in subject.model.named_modules() if is_adaptable(module)}
    layers = {name for name in layers if not any(name.startswith(f"{other}.") for other in layers)}  # out_proj
    missing = layers - {layer.fqn for layer in subject.graph.layers} - explained
    assert not missing, f"neither traced nor a barrier: {', '.join(sorted(missing)[:3])} ({len(missing)})"
    assert all(barrier.reason for barrier in subject.graph.barriers)


def _fed(subject: Subject, explained: set[str]) -> list[str]:
    """Returns the layers whose input depends on another layer's weight, by autograd.

    What autograd cannot tell is which entries of a tensor depend on which: a class token beside pixels does not. So
    where there is no explanation, the gradient has to be other than zero.
    """
    model = subject.base().requires_grad_(False)
    found: dict[str, None] = {}
    stack: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if given and given[0].requires_grad and not stack and (name in explained or reached(given[0])):
                found[name] = None
            stack.append(name)

        def after(*_: Any) -> None:
            stack.pop()

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def reached(x: Tensor) -> bool:
        trained = [p for p in model.parameters() if p.requires_grad]
        return any(
            g is not None and g.any()
            for g in torch.autograd.grad(x.square().sum(), trained, allow_unused=True, retain_graph=True)
        )

    layers = {name: module for name, module in model.named_modules() if is_adaptable(module)}
    for name, module in layers.items():
        watch(name, module)
        module.requires_grad_(True)
    for module in model.modules():
        if not is_adaptable(module):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)  # an embedding may share its weight with a head
    subject.outputs(model)
    return list(found)


LAWS: dict[str, Callable[[Subject], None]] = {
    "start": starts_as_the_frozen_model,
    "step": trains_what_lora_trains,
    "host": hosts_lora,
    "fold": folds,
    "reload": reloads,
    "modes": training_mode_changes_nothing,
    "exponent": minus_one_undoes_exact_edges,
    "explained": explains_every_layer,
}
