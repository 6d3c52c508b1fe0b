"""Every kind of adapter: AdamW's bits without a probe, a usable h with one, saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, contrastive_loss, task_loss
from tests.tiny import (
    HIDDEN,
    VOCABULARY,
    Problem,
    assert_same_bits,
    plain_adamw,
    random_batch,
    repeated,
)

QV = ["q_proj", "v_proj"]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}


def base(kind: str = "Llama", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM"} | settings)


#: What CorDA's first values are made for: covariances of a few batches.
CORDA = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))


def corda() -> nn.Module:
    """A base with what CorDA measured on it."""
    pytest.importorskip("attr")  # PEFT imports it there, and does not ask for it
    from peft.tuners.lora.corda import preprocess_corda

    model = base()
    with torch.no_grad():
        preprocess_corda(
            model,
            CORDA,
            run_model=lambda: [model(**random_batch(rows=1, seed=k)) for k in range(24)],
        )
    return model


tied = partial(base, tie_word_embeddings=True)
mixtral = partial(base, "Mixtral", **EXPERTS)
qwen_moe = partial(base, "Qwen3Moe", moe_intermediate_size=16, decoder_sparse_step=1, **EXPERTS)
experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

#: The base, and the configuration of what is put on it.
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "lora": (base, lora()),
    "rslora": (base, lora(use_rslora=True)),
    "pissa": (base, lora(init_lora_weights="pissa")),
    "olora": (base, lora(init_lora_weights="olora")),
    "corda": (corda, CORDA),
    "dora": (base, lora(use_dora=True)),
    "all-linear": (base, lora(target_modules="all-linear")),
    "modules_to_save": (base, lora(modules_to_save=["lm_head"])),
    "modules_to_save, tied": (
        tied,
        lora(modules_to_save=["lm_head", "embed_tokens"], ensure_weight_tying=True),
    ),
    "trainable_token_indices": (base, lora(trainable_token_indices=[1, 2, 5])),
    "trainable_token_indices, tied": (tied, lora(trainable_token_indices=[1, 2, 5])),
    "experts of Mixtral": (mixtral, lora(target_modules=[], target_parameters=experts)),
    "experts of Qwen": (qwen_moe, lora(target_parameters=experts)),
    "ia3": (
        base,
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
    ),
    "vera": (base, peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    "loha": (base, peft.LoHaConfig(r=4, target_modules=QV, task_type="CAUSAL_LM")),
    "lokr": (base, peft.LoKrConfig(r=4, target_modules=QV, task_type="CAUSAL_LM")),
    "oft": (base, peft.OFTConfig(oft_block_size=8, target_modules=QV, task_type="CAUSAL_LM")),
    "prompt tuning": (
        base,
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ),
    "prefix tuning": (
        base,
        peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ),
}


#: The rest repeats these.
QUICK = (
    *("lora", "dora", "modules_to_save, tied", "trainable_token_indices", "experts of Mixtral"),
    *("ia3", "vera", "oft", "prompt tuning", "prefix tuning"),
)


def adapted(name: str, *, moved: bool = True) -> Problem:
    """A problem with an adapter; `moved` a little, as after some training."""
    make, config = ADAPTERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are meant
        model = get_peft_model(make(), config)
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.05 * noise)
    return Problem(model.train(), *(random_batch(seed=seed) for seed in (1, 2, 3)))


def steps(case: Problem, optimizer: Any, number: int = 1, bf16: bool = False) -> None:
    def task() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task_loss(case.model, case.batch)
        loss.backward()
        return loss

    def safety() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = contrastive_loss(case.model, case.chosen, case.rejected)
        loss.backward()
        return loss

    for _ in range(number):
        optimizer.zero_grad()
        if isinstance(optimizer, BlendedAdamW):
            optimizer.step(task, safety)
        else:
            task()
            optimizer.step()


def trained(case: Problem) -> list[Tensor]:
    return [parameter.detach() for parameter in case.trained]


@pytest.mark.parametrize("name", repeated(ADAPTERS, QUICK))
def test_h_is_usable_and_the_adapter_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = adapted(name)
    before = [tensor.clone() for tensor in trained(case)]
    probes = ProbeSet(case.model, [0, 1], rho=1e-2)
    optimizer = FusedSAP(case.trained, probes, lr=1e-2)
    steps(case, optimizer)
    assert optimizer.metrics.skipped_steps == 0
    for h in probes.estimates.values():
        assert h.isfinite().all() and h.norm() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trained(case), strict=True))

    case.model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(ADAPTERS[name][0](), tmp_path).eval()
    ids = case.batch["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, case.model(input_ids=ids).logits)


@pytest.mark.parametrize("name", repeated(ADAPTERS, QUICK))
def test_without_a_probe_or_blending_it_is_adamw_bit_for_bit(name: str) -> None:
    found = []
    for kind in ("adamw", "no size", "no weight"):
        case = adapted(name)
        optimizer: torch.optim.Optimizer
        if kind == "adamw":
            optimizer = plain_adamw(case.trained, lr=1e-2)
        elif kind == "no size":
            probes = ProbeSet(case.model, [1], rho=1e-2, size=0.0)
            optimizer = FusedSAP(case.trained, probes, lr=1e-2)
        else:
            optimizer = BlendedAdamW(case.trained, lr=1e-2, safety_weight=0.0)
        steps(case, optimizer, 2)
        found.append(trained(case))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def test_the_groups_of_lora_plus() -> None:
    """B learns 16 times as fast as A, in FusedSAP as in AdamW."""
    found = []
    for kind in (FusedSAP, torch.optim.AdamW):
        case = adapted("lora")
        options: dict[str, Any] = {"probes": ProbeSet(case.model, [1], rho=1e-2, size=0.0)}
        if kind is torch.optim.AdamW:
            options = dict(plain_adamw(case.trained).defaults)
            options = {"fused": options["fused"]}
        optimizer = create_loraplus_optimizer(
            case.model, kind, lr=1e-3, loraplus_lr_ratio=16, **options
        )
        rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
        assert rates == {1e-3, 16e-3}
        steps(case, optimizer, 2)
        found.append(trained(case))
    assert_same_bits(*found)


def test_of_several_adapters_the_active_one_is_trained() -> None:
    found = []
    for several in (False, True):
        case = adapted("lora")
        if several:
            case.model.add_adapter("second", lora(init_lora_weights=False))
        probes = ProbeSet(case.model, [0, 1], rho=1e-2)
        second = [p for n, p in case.model.named_parameters() if ".second." in n]
        before = [parameter.detach().clone() for parameter in second]
        steps(case, FusedSAP(case.model.parameters(), probes, lr=1e-2))
        assert_same_bits(second, before)
        found.append(trained(case) + list(probes.estimates.values()))
    assert len(before) == 12
    assert_same_bits(*found)
    case.model.set_adapter("second")
    steps(case, FusedSAP(case.trained, ProbeSet(case.model, [1], rho=1e-2), lr=1e-2))
    assert all(not torch.equal(a, b) for a, b in zip(second, before, strict=True))


def test_fp32_adapters_on_a_bf16_base_under_autocast() -> None:
    found = []
    for size in (0.0, None, 0.05):
        torch.manual_seed(0)
        model = get_peft_model(base().to(torch.bfloat16), lora(init_lora_weights=False))
        case = Problem(model.train(), *(random_batch(seed=seed) for seed in (1, 2, 3)))
        assert {parameter.dtype for parameter in case.trained} == {torch.float32}
        if size is None:
            steps(case, plain_adamw(case.trained, lr=1e-2), 2, bf16=True)
        else:
            probes = ProbeSet(case.model, [1], rho=5e-2, size=size)
            steps(case, FusedSAP(case.trained, probes, lr=1e-2), 2, bf16=True)
        found.append(trained(case))
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[0][0], found[2][0])
    assert probes.compute_dtype == torch.bfloat16
    assert probes.estimates[1].isfinite().all() and probes.estimates[1].norm() > 0
