"""DeepSpeed's ZeRO, stages 1 to 3, in one's own loop and in the trainer: two ranks are one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import BlendedAdamW, ProbeSet, SAPTrainer
from sap_fast.baselines import SAMTrainer
from tests import zero
from tests.integrations.test_stacks import build
from tests.ranks import distance, on_ranks
from tests.tiny import assert_same_bits, problem, weights
from tests.trainers import small

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed; make test-stacks has it"
)
STAGES = [1, 2, 3]
BLEND: dict[str, Any] = {"safety_weight": 0.3}
#: Of the trainer.
CONFIGURATION: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
}
SAP: dict[str, Any] = {"probe": zero.PROBE, "safety_weight": 0.0}
BOTH: dict[str, Any] = {"probe": zero.PROBE, "safety_weight": 0.2, "rule": "floor"}


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("DEEPSPEED_LOG_LEVEL", "warning")


def movement(lora: bool, after: list[Tensor]) -> list[Tensor]:
    return [a - b.detach() for a, b in zip(after, problem(lora=lora).trained, strict=True)]


# ---- in one's own loop ----

#: What differs from the default of three steps of LoRA.
CASES: dict[str, dict[str, Any]] = {
    "blend": BLEND,
    "sap": SAP,
    "both, accumulated, clipped": BOTH | {"micro_batches": 2, "clip": 0.1},
    "blend, full": BLEND | {"lora": False},
    "sap, full": SAP | {"lora": False},
    "the level held, the direction kept": BLEND
    | {"safety_level": "auto", "direction_every": 2, "steps": 5},
    "calibrated": SAP | {"probe": zero.PROBE | {"rho": "auto"}},
    # One pass of two at W, from which the task pass goes on. ρ is larger, for less of rounding.
    "by forward differences": SAP | {"probe": zero.PROBE | {"rho": 5e-2, "difference": "forward"}},
}
#: The ρ that calibration finds is smaller than 1e-2, so that more of h is rounding.
WITHIN = {"calibrated": 5e-5}


def run_cases(rank: int, stage: int) -> dict[str, list[Tensor]]:
    found = {}
    for name, case in CASES.items():
        settings = {"lora": True} | case
        steps, clip = settings.pop("steps", 3), settings.pop("clip", 0.0)
        run = zero.Run(rank, stage, config={"gradient_clipping": clip}, **settings)
        found[name] = run.run(steps)
        assert run.passes.steps == steps and run.passes.metrics.skipped_steps == 0
    if stage == 3:
        found["sap, sharded before"] = zero.Run(rank, 3, True, sharded_before=True, **SAP).run(3)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one_without_deepspeed(tmp_path: Path, stage: int) -> None:
    first, second = on_ranks(tmp_path, run_cases, stage)
    assert_same_bits(first, second)
    assert_same_bits(first.get("sap, sharded before", first["sap"]), first["sap"])
    for name, case in CASES.items():
        settings = {"lora": True, "steps": 3, "probe": None, "safety_level": None} | case
        settings["max_grad_norm"] = settings.pop("clip", None)
        lora = settings["lora"]
        expected = movement(lora, zero.by_hand(**settings))
        off = {"probe": None, "safety_weight": 0.0, "rule": "blend"}
        plain = movement(lora, zero.by_hand(**settings | off))
        assert distance(movement(lora, first[name]), expected) <= WITHIN.get(name, 1e-5), name
        assert distance(plain, expected) > 1e-2, name


def run_off(rank: int, stage: int) -> list[list[list[Tensor]]]:
    """Without DeepSpeed's passes, with nothing to do, and with a probe of size 0; two dtypes."""
    off = {"probe": zero.PROBE | {"size": 0.0}, "safety_weight": 0.0}
    found = []
    for bf16 in (False, True):
        config = {"bf16": {"enabled": bf16}, "gradient_clipping": 0.1}
        runs: list[dict[str, Any]] = [{"passes": False}, {"safety_weight": 0.0}, off]
        for lora in (True, False):
            found.append([zero.Run(rank, stage, lora, config=config, **r).run(3) for r in runs])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_without_blending_and_probe_it_is_plain_deepspeed_bit_for_bit(
    tmp_path: Path, stage: int
) -> None:
    for plain, nothing, no_size in on_ranks(tmp_path, run_off, stage)[0]:
        assert_same_bits(plain, nothing)
        assert_same_bits(plain, no_size)


def run_bf16(rank: int, stage: int, alone: bool) -> dict[str, list[Tensor]]:
    config: dict[str, Any] = {"bf16": {"enabled": True}}
    if stage == 2:  # where the averaged gradients lie in another form
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    sap = SAP | {"probe": zero.PROBE | {"rho": 5e-2}}
    settings = {"blend": BLEND, "sap": sap, "plain": {"passes": False}}
    rows = None if alone else rank
    return {
        name: zero.Run(rows, stage, True, config=config, **how).masters(3)
        for name, how in settings.items()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_in_bf16_two_ranks_equal_one_to_its_rounding(tmp_path: Path, stage: int) -> None:
    first, second = on_ranks(tmp_path, run_bf16, stage, False)
    assert_same_bits(first, second)
    (alone,) = on_ranks(tmp_path, run_bf16, stage, True, ranks=1)
    exact = movement(True, zero.by_hand(True, 3, None, safety_level=None, **BLEND))
    moved = {name: movement(True, found) for name, found in first.items()}
    apart = {name: distance(moved[name], movement(True, found)) for name, found in alone.items()}
    assert apart["blend"] <= 1.5 * apart["plain"] + 1e-3 <= 0.05
    # bf16 leaves h less exact than the gradient.
    assert apart["sap"] < distance(moved["sap"], moved["plain"]) / 2
    assert distance(moved["blend"], exact) < distance(moved["blend"], moved["plain"]) / 2


def run_resumed(rank: int, stage: int, folder: str) -> list[Any]:
    """Four steps, and two steps, a checkpoint, and two more in another engine."""
    settings = SAP | {"safety_weight": 0.2, "safety_level": "auto", "direction_every": 3}
    settings["probe"] = zero.PROBE | {"rho": "auto"}
    straight = zero.Run(rank, stage, True, **settings)
    expected = straight.run(4)
    begun = zero.Run(rank, stage, True, **settings)
    begun.run(2)
    begun.engine.save_checkpoint(folder)
    goes_on = zero.Run(rank, stage, True, **settings)
    goes_on.step(9)  # what it did before is forgotten
    goes_on.engine.load_checkpoint(folder)
    assert goes_on.passes.steps == 2 and goes_on.passes.calibration == begun.passes.calibration
    assert not goes_on.passes.direction.is_due(2)
    for step in (2, 3):
        goes_on.step(step)
    return [expected, goes_on.weights()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path, stage: int) -> None:
    for expected, resumed in on_ranks(tmp_path, run_resumed, stage, str(tmp_path / "saved")):
        assert_same_bits(expected, resumed)


class Interrupted(Exception):
    pass


def run_interrupted(rank: int, stage: int) -> list[list[Tensor]]:
    """Two steps, the second of which fails in each of its passes before it is done."""
    found = []
    settings = BOTH | {"probe": zero.PROBE | {"rho": 1e-2}}
    for failures in ([], [1, 2, 3]):
        run = zero.Run(rank, stage, True, **settings)
        run.step(0)
        before, weights_before = torch.get_rng_state(), run.weights()
        for backward in failures:
            run.fails_after(backward, Interrupted())
            with pytest.raises(Interrupted):
                run.step(1)
            assert_same_bits(run.weights(), weights_before)
            assert torch.equal(torch.get_rng_state(), before)
            assert all(p.requires_grad for p in run.trained)
        run.step(1)
        found.append(run.weights())
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_in_an_inner_pass_leaves_no_trace(tmp_path: Path, stage: int) -> None:
    for undisturbed, disturbed in on_ranks(tmp_path, run_interrupted, stage):
        assert_same_bits(undisturbed, disturbed)


def run_edges(rank: int, folder: str) -> None:
    from sap_fast.integrations.deepspeed import ZeroPasses

    with pytest.raises(ValueError, match="SAMTrainer reads the gradients of parameters"):
        build(SAMTrainer, Path(folder), small(True), how={}, deepspeed=CONFIGURATION)

    for stage in STAGES:
        run = zero.Run(rank, stage, True, micro_batches=2, **BLEND)
        run.step(0)
        run.engine.backward(zero.task_loss(run.engine, zero.window(1, rank, 1)[0]))
        with pytest.raises(RuntimeError, match="before the first one of a step"):
            run.step(1)
        with pytest.raises(ValueError, match="another one for another engine"):
            run.passes.runs_in(nn.Linear(1, 1))
        with pytest.raises(ValueError, match="has a ZeroPasses already"):
            ZeroPasses(run.engine)
        state = run.passes.state_dict()
        state["direction"]["tensors"] = {0: torch.zeros(3)}
        with pytest.raises(ValueError, match="the saved direction of parameter 0 has the shape"):
            run.passes.load_state_dict(state)
    with pytest.raises(ValueError, match=r'"stage": 0: without ZeRO'):
        zero.Run(rank, 0, True, **BLEND)
    with pytest.raises(ValueError, match=r"BF16_Optimizer.*grad_accum_dtype"):
        config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        zero.Run(rank, 1, True, config=config, **BLEND)
    with pytest.raises(ValueError, match=r"give what deepspeed\.initialize returned"):
        ZeroPasses(problem().model)


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    on_ranks(tmp_path, run_edges, str(tmp_path))


def test_a_probe_that_goes_by_the_length_of_the_gradient_is_refused() -> None:
    from sap_fast.integrations.deepspeed import ZeroPasses

    probes = ProbeSet(problem().model, layers=[1], rule="lean")
    with pytest.raises(ValueError, match=r'give ProbeSet\(rule="normalized"\)'):
        ZeroPasses(SimpleNamespace(), probes)


REFUSED: dict[str, dict[str, Any]] = {
    "a pipeline runs forward": {"pipeline_parallelism": True},
    "use bf16": {"fp16_enabled": lambda: True},
    '"offload_optimizer" to cpu': {"zero_offload_optimizer": lambda: SimpleNamespace(device="cpu")},
    '"offload_param" to nvme': {"zero_offload_param": lambda: SimpleNamespace(device="nvme")},
    r"ZeRO\+\+": {"zero_quantized_weights": lambda: True},
    "a second or quantized copy": {"zero_hpz_partition_size": lambda: 2},
    "ZenFlow": {"zenflow": True},
    "deepcompile": {"is_deepcompile_enabled": lambda: True},
    "expert or tensor parallelism": {"autotp_size": lambda: 2},
    "managed_gradient_accumulation": {"managed_gradient_accumulation": lambda: False},
    "give torch.optim.AdamW": {},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_zero_can_do_and_the_passes_cannot_is_refused(message: str) -> None:
    from sap_fast.integrations.deepspeed import refuse_unusable

    inner: Any = torch.optim.AdamW
    if "AdamW" in message:
        inner = BlendedAdamW
    optimizer = SimpleNamespace(averaged_gradients={}, dp_process_group=None)
    optimizer.optimizer = inner([nn.Parameter(torch.zeros(1))])
    off = ("fp16_enabled", "torch_autocast_enabled", "super_offload", "is_deepcompile_enabled")
    quantized = [f"zero_quantized_{name}" for name in ("weights", "nontrainable_weights")]
    engine = SimpleNamespace(
        **{name: lambda: False for name in (*off, *quantized, "zero_quantized_gradients")},
        **{name: lambda: None for name in ("zero_offload_optimizer", "zero_offload_param")},
        **{name: lambda: 1 for name in ("zero_hpz_partition_size", "autotp_size")},
        managed_gradient_accumulation=lambda: True,
        zero_optimization_stage=lambda: 2,
        pipeline_parallelism=False,
        zenflow=False,
        has_moe_layers=False,
        optimizer=optimizer,
    )
    vars(engine).update(REFUSED[message])
    with pytest.raises(ValueError, match=message):
        refuse_unusable(engine)


# ---- in the trainer ----


def trained(
    rank: int, folder: str, stage: int, method: str, lora: bool, ranks: int = 2, **settings: Any
) -> Any:
    """A trainer that has trained on the rows of a rank; without DeepSpeed if the stage is 0."""
    how: dict[str, Any] = {"sap_options": {"safety_weight": 0.3}, "method": "blend"}
    if method == "sap":
        how = {"probe": {"layers": [1], "rho": 1e-2, "size": 0.1}}
    shares = dict.fromkeys(("per_device_train_batch_size", "safety_batch_size"), 4 // ranks)
    if stage:
        settings["deepspeed"] = CONFIGURATION | {"zero_optimization": {"stage": stage}}
    resume = settings.pop("resume", None)
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0} | settings
    trainer = build(SAPTrainer, Path(folder), small(lora), how=how, **shares, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_trainers(rank: int, stage: int, folder: str) -> dict[str, list[Tensor]]:
    import deepspeed

    found = {}
    for method in ("blend", "sap"):
        for lora in (True, False):
            trainer = trained(rank, folder, stage, method, lora)
            assert type(trainer.passes).__name__ == "ZeroPasses" and trainer.passes.steps == 2
            assert (trainer.probe_set is None) == (method == "blend")
            logs = [row for row in trainer.state.log_history if "loss" in row]
            assert all(row["sap/skipped_steps"] == 0 for row in logs)
            with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
                found[f"{method} {lora}"] = weights(trainer.model)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_of_the_trainer_equal_one_without_deepspeed(tmp_path: Path, stage: int) -> None:
    first, second = on_ranks(tmp_path, run_trainers, stage, str(tmp_path))
    assert_same_bits(first, second)
    for case, found in first.items():
        method, lora = case.split()
        alone = weights(trained(0, str(tmp_path), 0, method, lora == "True", ranks=1).model)
        start = weights(small(lora == "True"))
        moved = [[a - b for a, b in zip(w, start, strict=True)] for w in (found, alone)]
        assert distance(*moved) <= 1e-5, case


def run_resumed_trainer(rank: int, stage: int, folder: str) -> list[list[Tensor]]:
    import deepspeed

    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "max_grad_norm": 0.05}
    found = []
    for name, resume in {"a": None, "b": f"{folder}/a/checkpoint-2"}.items():
        trainer = trained(rank, f"{folder}/{name}", stage, "sap", True, **settings, resume=resume)
        assert trainer.passes.steps == 4
        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            found.append(weights(trainer.model))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_trainer_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, stage: int
) -> None:
    for straight, resumed in on_ranks(tmp_path, run_resumed_trainer, stage, str(tmp_path)):
        assert_same_bits(straight, resumed)
