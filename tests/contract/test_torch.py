"""What torch does with an adapted model: copies, state dicts, checkpointing, gradients, compiling, autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from tests.contract.nets import adapted, disturb, ours, outputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from san_peft import SanLayer


def test_deepcopy_and_pickle_are_independent_and_stay_wired(kind):
    model = adapted(kind)
    before = outputs(model, kind, torch.float32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, kind, torch.float32), before)
        disturb(other, seed=3)
        assert torch.equal(outputs(model, kind, torch.float32), before)
        for name, layer in other.named_modules():
            if isinstance(layer, SanLayer):
                for edge in layer.san_incoming.get("default", []):
                    anterior = other.get_submodule(f"base_model.model.{edge.anterior}")
                    assert edge.banks[0] is anterior.san_scale, name


def test_state_dict_through_torch_save(kind, tmp_path):
    model = adapted(kind)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = get_peft_model(kind.net(), kind.config()).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(outputs(other, kind, torch.float32), outputs(model, kind, torch.float32))


def test_loading_tensors_by_assignment_stays_wired(kind):
    model = adapted(kind)
    other = get_peft_model(kind.net(), kind.config()).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(outputs(other, kind, torch.float32), outputs(model, kind, torch.float32))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    if kind.tokens and reentrant:
        pytest.skip("the reentrant kind needs an input with a gradient")

    def gradients(run) -> dict[str, Tensor]:
        model = get_peft_model(kind.net(), kind.config(shift=True)).train()
        disturb(model)
        x = kind.input() if kind.tokens else kind.input().requires_grad_()
        run(model, x).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if ours(n)}

    plain = gradients(lambda model, x: model(x))
    saved = gradients(lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient)


def test_a_hook_on_the_frozen_layer_sees_what_it_gave(kind):
    """The frozen layer's output is overwritten only where nobody else holds it."""
    model = adapted(kind, shift=True)
    before = outputs(model, kind, torch.float32)
    layer = next(m for m in model.modules() if isinstance(m, SanLayer))
    seen = []
    layer.get_base_layer().register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    assert torch.equal(outputs(model, kind, torch.float32), before)
    ((x, out),) = seen
    with torch.no_grad():
        torch.testing.assert_close(out, type(layer.get_base_layer()).forward(layer.get_base_layer(), x))


def test_gradients_are_those_of_autograd_through_folded_weights(kind):
    """The gradient of every vector equals the one autograd finds through the folded weights, in float64."""
    from san_peft.functional import fold

    if kind.inner is not None:
        pytest.skip("hosts have a formula of their own: see tests/tuner/test_hosts.py")
    if "attn" in kind.targets:
        pytest.skip("see tests/tuner/test_attention.py")
    model = adapted(kind, shift=True).double().train()
    x = kind.input(torch.float64)
    model(x).square().sum().backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if ours(n)}
    model.zero_grad()
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SanLayer)}
    folded = {}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight, bias = differentiable_fold(layer, base)
        folded[f"{name}.base_layer.weight"] = weight
        if getattr(base, "bias", None) is not None:
            folded[f"{name}.base_layer.bias"] = bias
        with torch.no_grad():
            plain = fold(
                base.weight,
                getattr(base, "bias", None),
                layer.get_scale(),
                layer.get_input_scale(),
                layer.get_shift(),
                groups=layer.groups,
                transposed=layer.transposed,
            )
        torch.testing.assert_close(plain[0], weight.detach())
    bare = {n: m for n, m in layers.items() if getattr(m.get_base_layer(), "bias", None) is None}
    shifts = {n: layer.get_shift() for n, layer in bare.items()}
    with model.base_model.set_mode("off"):
        for name, shift in shifts.items():  # without a bias the shift is added by a hook
            dim = layers[name].channel_dim
            shape = [-1 if d == dim else 1 for d in range(-x.dim() if dim != -1 else -2, 0)]
            layers[name].register_forward_hook(lambda m, a, out, s=shift, shape=shape: out + s.view(shape))
        out = torch.func.functional_call(model.base_model.model, folded, (x,))
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if ours(name):
            torch.testing.assert_close(parameter.grad, mine[name], rtol=1e-9, atol=1e-9)


def differentiable_fold(layer: SanLayer, base: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Folds with plain broadcasting, a formula of its own."""
    weight, scale, columns = base.weight, layer.get_scale(), layer.get_input_scale()
    ones = torch.ones(layer.out_features, dtype=weight.dtype)
    scale = ones if scale is None else scale
    if layer.transposed:
        tail = [1] * (weight.dim() - 2)
        per_row = scale.view(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)
        out = weight * per_row.view(*per_row.shape, *tail)
        out = out if columns is None else columns.view(-1, 1, *tail) * out
    else:
        tail = [1] * (weight.dim() - 2)
        out = weight * scale.view(-1, 1, *tail)
        if columns is not None:
            per_row = columns.view(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)
            out = out * per_row.view(*per_row.shape, *tail)
    bias = getattr(base, "bias", None)
    shift = layer.get_shift()
    return out, None if bias is None else bias * scale + (0 if shift is None else shift)


@pytest.mark.slow
def test_compile(kind):
    torch.compiler.reset()
    model = adapted(kind, shift=True)
    before = outputs(model, kind, torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, kind, torch.float32), before)
    model.train()
    x = kind.input()
    model(x).sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    for name, parameter in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-5)


def test_autocast(kind):
    model = adapted(kind, shift=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(kind.input())
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(kind.input()), rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if ours(n))
