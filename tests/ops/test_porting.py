"""The code of docs/operator.md, run as it stands there: on one process and on two ranks, against fp64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import reference
from tests import gloo

parallel_state = pytest.importorskip("megatron.core.parallel_state")

PAGE = Path(__file__).parents[2] / "docs" / "operator.md"
S, B, VOCAB = 5, 3, 101


def code_under(heading: str) -> str:
    """The Python block of a section of the page."""
    (section,) = re.findall(rf"^#+ {heading}$(.*?)(?=^#|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return code


def function(heading: str, name: str) -> Any:
    scope: dict[str, Any] = {}
    exec(compile(code_under(heading), str(PAGE), "exec"), scope)
    return scope[name]


def inputs(shape: tuple[int, int], vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the whole vocabulary, labels, and a mask."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*shape, vocab, generator=g)
    return logits, torch.randint(vocab, shape, generator=g), (torch.rand(shape, generator=g) < 0.7).float()


def own_columns(logits: Tensor, rank: int, world: int) -> Tensor:
    """This rank's columns, the vocabulary padded to a multiple of 8 with large logits that must not count."""
    vocab = logits.shape[-1]
    padded = torch.nn.functional.pad(logits, (0, -vocab % (8 * world)), value=50.0)
    return padded.chunk(world, dim=-1)[rank].clone().requires_grad_()


def whole(gradients: list[Tensor]) -> Tensor:
    """The ranks' gradients side by side; the padding must have none."""
    gradient = torch.cat(gradients, -1)
    assert not gradient[..., VOCAB:].any()
    return gradient[..., :VOCAB]


def megatron_loss(rank: int, world: int, vocab: int, coefficient: float) -> tuple[Tensor, ...]:
    """Loss and gradient of the page's function; where nothing is padded, Megatron's own cross entropy and its."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world, create_gloo_process_groups=False)
    logits, labels, mask = inputs((S, B), vocab)
    local = own_columns(logits, rank, world)
    options = {"vocab_size": vocab, "entropy_coefficient": coefficient}
    loss = function("Megatron-LM", "loss_func")(local, labels, mask, **options)
    results = [loss.detach(), *torch.autograd.grad(loss, local)]
    if local.shape[-1] * world == vocab:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        theirs = (vocab_parallel_cross_entropy(local.clone(), labels) * mask).sum() / mask.sum()
        results += [theirs.detach(), *torch.autograd.grad(theirs, local)]
    return tuple(results)


@pytest.mark.parametrize("world", [1, 2])
def test_the_megatron_loss_equals_the_reference(world: int) -> None:
    ranks = gloo.run(megatron_loss, world, VOCAB, 0.1)
    logits, labels, mask = inputs((S, B), VOCAB)
    exact = logits.double().requires_grad_()
    tokens, targets = exact.flatten(0, 1), labels.flatten()
    each = -reference.logprob(tokens, targets) - 0.1 * reference.entropy(tokens)
    loss = (each * mask.flatten()).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, exact)
    for found in ranks:
        torch.testing.assert_close(found[0].double(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole([found[1] for found in ranks]).double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world", [1, 2])
def test_without_entropy_and_padding_the_megatron_loss_is_megatrons_cross_entropy(world: int) -> None:
    for loss, gradient, their_loss, their_gradient in gloo.run(megatron_loss, world, 96, 0.0):
        torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-7)


def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """What verl documents under this name: ``[..., V]`` and ``[...]`` to the labels' log-probabilities ``[...]``."""
    return torch.nn.functional.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def entropy_from_logits(logits: Tensor) -> Tensor:
    """What verl documents under this name: ``[..., V]`` to the entropy of the softmax ``[...]``."""
    return torch.distributions.Categorical(logits=logits).entropy()


def verl_pair(rank: int, world: int, temperature: float, calculate_entropy: bool) -> dict[str, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world, create_gloo_process_groups=False)
    logits, label, weight = inputs((B, S), VOCAB)
    local = own_columns(logits, rank, world)
    options = {"vocab_size": VOCAB, "temperature": temperature, "calculate_entropy": calculate_entropy}
    out = function("verl", "logits_processor")(local, label, **options)
    assert torch.equal(local.detach(), own_columns(logits, rank, world).detach())
    loss = torch.stack([(weight * value).sum() for value in out.values()]).sum()
    (gradient,) = torch.autograd.grad(loss, local)
    return {name: value.detach() for name, value in out.items()} | {"gradient": gradient}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("calculate_entropy", [True, False])
def test_the_verl_processor_equals_its_pair(world: int, calculate_entropy: bool) -> None:
    ranks = gloo.run(verl_pair, world, 0.7, calculate_entropy)
    logits, label, weight = inputs((B, S), VOCAB)
    exact = logits.double().requires_grad_()
    expected = {"log_probs": logprobs_from_logits(exact / 0.7, label)}
    if calculate_entropy:
        expected["entropy"] = entropy_from_logits(exact / 0.7)
    (gradient,) = torch.autograd.grad(torch.stack([(weight * v).sum() for v in expected.values()]).sum(), exact)
    for found in ranks:
        assert found.keys() - {"gradient"} == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value.detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(whole([found["gradient"] for found in ranks]).double(), gradient, rtol=1e-5, atol=1e-6)


def test_the_five_lines_run() -> None:
    scope: dict[str, Any] = {}
    exec(compile(code_under("In five lines"), str(PAGE), "exec"), scope)
    exact = scope["logits"].detach().double().requires_grad_()
    mask = reference.nucleus_mask(exact, 0.8, 0.6)
    loss = reference.logprob(exact, scope["targets"], 0.6) + 0.01 * reference.entropy(exact, 0.6)
    (gradient,) = torch.autograd.grad((loss + 0.1 * reference.nucleus_entropy(exact, mask, 0.6)).sum(), exact)
    torch.testing.assert_close(scope["logits"].grad.double(), gradient, rtol=1e-5, atol=1e-6)
