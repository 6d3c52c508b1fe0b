"""Layers are skipped in the task pass only where upper layers read nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.model.layers import lower_layers
from sap_fast.model.lower_forward import LowerForward
from tests.tiny import problem

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
SHARED = TEXT | {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}


def gemma3() -> nn.Module:
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    config = T.Gemma3Config(
        text_config=TEXT | {"sliding_window": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        image_token_index=63,
        mm_tokens_per_image=4,
    )
    return T.Gemma3ForConditionalGeneration(config)


def gemma3n() -> nn.Module:
    more = {"altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": None}
    return T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**SHARED | more))


def gemma4() -> nn.Module:
    return T.Gemma4ForCausalLM(T.Gemma4TextConfig(**SHARED, global_head_dim=8))


def qwen3_vl() -> nn.Module:
    vision = dict(hidden_size=16, intermediate_size=16, depth=2, num_heads=2, out_hidden_size=16)
    config = T.Qwen3VLConfig(
        text_config=TEXT | MROPE,
        vision_config=vision | {"patch_size": 4, "deepstack_visual_indexes": [0]},
    )
    return T.Qwen3VLForConditionalGeneration(config)


def llama() -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**TEXT))


def of(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    config = getattr(T, f"{kind}Config")
    return lambda: T.AutoModelForCausalLM.from_config(config(**TEXT | settings))


MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ZAMBA = {"mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8, "mamba_headdim": 8}
DELTA = {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
DELTA |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
#: Convolutions, linear attention or a state space in the place of some attention, or windows of it.
MIXED = {
    "lfm2": of("Lfm2", layer_types=["conv", "full_attention"] * 2),
    "qwen3_next": of(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention"] * 2,
        shared_expert_intermediate_size=16,
        **DELTA,
        **SPARSE,
    ),
    "zamba2": of(
        "Zamba2",
        layers_block_type=["mamba", "hybrid"] * 2,
        attention_head_dim=16,
        attention_hidden_size=32,
        n_mamba_heads=4,
        num_mem_blocks=1,
        use_mem_eff_path=False,
        **ZAMBA,
    ),
    "bamba": of("Bamba", attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=8, **MAMBA),
    "mistral": of("Mistral", sliding_window=4),
}


def batch(seed: int, more: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (2, 10), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    zeros = {key: torch.zeros_like(ids) for key in more}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **zeros}


def trained(make: Callable[[], nn.Module], more: tuple[str, ...], skips: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = make().train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
    rows, chosen, rejected = (batch(seed, more) for seed in (1, 2, 3))
    probes = ProbeSet(model, [2], rho=1e-2, size=0.05, difference="forward")
    if not skips:
        probes._lower = LowerForward([])
    optimizer = FusedSAP(model.parameters(), probes, lr=1e-3)

    def task() -> Tensor:
        loss = task_loss(model, rows)
        loss.backward()
        return loss

    def safety() -> Tensor:
        loss = contrastive_loss(model, chosen, rejected)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(task, safety)
    assert optimizer.metrics.skipped_steps == 0
    assert probes.estimates[2].isfinite().all() and probes.estimates[2].norm() > 0
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("make", "more"),
    [
        *((llama, ()), (gemma3, ("token_type_ids",)), (gemma3n, ()), (gemma4, ()), (qwen3_vl, ())),
        *(
            pytest.param(make, (), marks=pytest.mark.slow if name == "bamba" else ())
            for name, make in MIXED.items()
        ),
    ],
    ids=["llama", "gemma3", "gemma3n", "gemma4", "qwen3_vl", *MIXED],
)
def test_the_skip_changes_nothing(make: Callable[[], nn.Module], more: tuple[str, ...]) -> None:
    for ours, plain in zip(trained(make, more, True), trained(make, more, False), strict=True):
        assert torch.equal(ours, plain)


def test_layers_that_take_more_than_hidden_states_are_not_skipped() -> None:
    for make in (gemma3n, gemma4):
        model = make()
        assert lower_layers(model, ProbeSet(model, [2]).modules[2]) == []
    model = llama()
    assert len(lower_layers(model, ProbeSet(model, [2]).modules[2])) == 3


def test_inputs_in_dictionaries_are_compared_by_what_they_hold() -> None:
    case = problem(lora=False)
    lower = LowerForward(case.model.model.layers[:2])
    masks = {"full": torch.ones(2, 3), "sliding": torch.ones(2, 3)}
    hidden, params = torch.ones(2, 3), list(case.trained)

    def kept(second: dict[str, Any]) -> bool:
        lower.begin(params)
        lower.begin_forward((), {"masks": masks})
        lower.keep(hidden)
        lower.skip((), second)
        skipped = lower._output is None
        lower.forget()
        return skipped

    assert kept({"masks": dict(masks)})
    assert not kept({"masks": masks | {"sliding": torch.ones(2, 3)}})
    assert not kept({"masks": masks, "more": object()})
    lower.begin(params)
    lower.begin_forward((), {"masks": masks})
    lower.keep(hidden)
    masks["full"].add_(1)  # in place: the same tensor, another mask
    lower.skip((), {"masks": masks})
    assert lower._output is not None
    lower.forget()
