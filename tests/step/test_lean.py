"""`metrics.lean` against an fp64 copy of the model, for adapters of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from sap_fast import FusedSAP, ProbeSet
from tests.oracle import naive_contrastive_loss, naive_task_loss
from tests.tiny import HIDDEN, VOCABULARY, Problem, random_batch, tiny_llama

LAYERS = [1, 2]
#: Of the difference in W, along ĝ. The norms of transformers compute in fp32 in an fp64 model too,
#: whose rounding shows below.
STEP = 2e-3


def tiny_experts() -> nn.Module:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.15,
        pad_token_id=0,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return Qwen3MoeForCausalLM(config)


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """An adapter whose B is away from zero, as after some training."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    adapter = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter.train()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: tiny_llama(seed=1),
    "lora": lambda: adapted(tiny_llama(seed=1)),
    "dora": lambda: adapted(tiny_llama(seed=1), use_dora=True),
    "experts": lambda: adapted(tiny_experts(), target_parameters=EXPERTS),
}


def exact_lean(
    case: Problem, direction: dict[nn.Parameter, Tensor], offsets: dict[int, Tensor]
) -> float:
    """∂/∂ε of L_task(W + εĝ, V) − L_task(W + εĝ, 0) at ε = 0, by differences in fp64."""
    names = {parameter: name for name, parameter in case.model.named_parameters()}
    twin = copy.deepcopy(case.model).double()
    parameters = dict(twin.named_parameters())
    length = sum(d.double().square().sum() for d in direction.values()) ** 0.5
    moves = {names[p]: STEP * d.double() / length for p, d in direction.items()}
    found = ProbeSet(twin, LAYERS)
    found.detach()

    @torch.no_grad()
    def loss(sign: float, shifted: bool) -> float:
        handles = [
            found.modules[j].register_forward_hook(lambda m, a, output, v=v: output + v.double())
            for j, v in offsets.items()
            if shifted
        ]
        for name, move in moves.items():
            parameters[name].add_(sign * move)
        value = naive_task_loss(twin, case.batch).item()
        for name, move in moves.items():
            parameters[name].sub_(sign * move)
        for handle in handles:
            handle.remove()
        return value

    slopes = [(loss(1, shifted) - loss(-1, shifted)) / (2 * STEP) for shifted in (True, False)]
    return slopes[0] - slopes[1]


@pytest.mark.parametrize(
    ("kind", "autocast", "tolerance"),
    [
        # Measured: 0.4 to 2 %, in bf16 5 %. The difference of a slope by autograd and one from
        # losses was −0.0010 in the place of 0.0026 with DoRA, and 0.0012 under bf16 autocast.
        pytest.param("full", False, 0.02, marks=pytest.mark.slow),
        ("lora", False, 0.03),
        ("dora", False, 0.03),
        ("experts", False, 0.03),
        ("lora", True, 0.1),
        pytest.param("full", True, 0.1, marks=pytest.mark.slow),
    ],
)
def test_lean_is_that_of_the_loss(kind: str, autocast: bool, tolerance: float) -> None:
    batches = (random_batch(seed=10 + k) for k in (1, 2, 3))
    case = Problem(MODELS[kind](), *batches)

    def backward(loss_of: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of()
        loss.backward()
        return loss

    def task(_: Any = None) -> Tensor:
        return backward(lambda: naive_task_loss(case.model, case.batch))

    def safety() -> Tensor:
        return backward(lambda: naive_contrastive_loss(case.model, case.chosen, case.rejected))

    probes = ProbeSet(case.model, LAYERS)
    optimizer = FusedSAP(case.trained, probes, lr=0.0)
    optimizer.passes.keeps_direction = True
    optimizer.inner_passes(task, safety)
    with optimizer.task_pass():
        task()
    direction = {p: d.clone() for p, d in optimizer.passes.direction.by_parameter().items()}
    optimizer.step()
    exact = exact_lean(case, direction, probes.offsets)
    assert exact > 0
    assert optimizer.metrics.lean == pytest.approx(exact, rel=tolerance)
