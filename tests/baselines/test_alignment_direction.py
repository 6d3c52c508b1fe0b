"""Safe LoRA and AsFT, against updates that are formed in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import task_loss
from sap_fast.baselines import AsFTTrainer, project_onto_alignment
from tests.baselines.by_hand import ACCUMULATED, window_loss
from tests.trainers import BeforeEachUpdate, arguments, model, small, trainer_of


def adapted() -> tuple[Any, dict[str, Tensor], list[tuple[str, Any]]]:
    """A model with LoRA that does something, the weights before alignment, and its layers."""
    tuned: Any = small(lora=True)
    layers = [
        (name, module)
        for name, module in tuned.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight") and module.lora_A
    ]
    generator = torch.Generator().manual_seed(0)
    unaligned = {}
    for name, layer in layers:
        layer.lora_B["default"].weight.data.normal_(generator=generator)
        weight = layer.get_base_layer().weight
        unaligned[f"{name}.weight"] = weight + torch.randn(weight.shape, generator=generator)
    return tuned, unaligned, layers


def projection(layer: Any, unaligned: Tensor) -> Tensor:
    moved = layer.get_base_layer().weight.detach().double() - unaligned.double()
    return moved @ moved.T / moved.norm()


def test_safe_lora_projects_the_updates_that_have_little_to_do_with_alignment() -> None:
    tuned, unaligned, layers = adapted()
    before = {name: layer.get_delta_weight("default").double() for name, layer in layers}
    projected = {
        name: projection(layer, unaligned[f"{name}.weight"]) @ before[name]
        for name, layer in layers
    }
    cosines = {
        name: float(torch.cosine_similarity(before[name].flatten(), p.flatten(), dim=0))
        for name, p in projected.items()
    }
    threshold = sorted(cosines.values())[len(cosines) // 2]
    found = project_onto_alignment(tuned, unaligned, threshold)
    assert found == pytest.approx(cosines, rel=1e-5)
    changed = 0
    for name, layer in layers:
        below = cosines[name] < threshold - 1e-6
        changed += below
        expected = projected[name] if below else before[name]
        if abs(cosines[name] - threshold) > 1e-6:  # at the threshold rounding decides
            torch.testing.assert_close(
                layer.get_delta_weight("default").double(), expected, rtol=1e-4, atol=1e-5
            )
    assert 0 < changed < len(layers)


def test_a_threshold_of_minus_one_changes_nothing() -> None:
    tuned, unaligned, layers = adapted()
    before = [layer.get_delta_weight("default") for _, layer in layers]
    project_onto_alignment(tuned, unaligned, -1.0)
    assert all(
        torch.equal(layer.get_delta_weight("default"), was)
        for (_, layer), was in zip(layers, before, strict=True)
    )


def test_asft_adds_the_square_of_what_is_outside_of_alignment(tmp_path: Path) -> None:
    tuned, unaligned, layers = adapted()
    args = arguments(tmp_path, gradient_accumulation_steps=ACCUMULATED, max_grad_norm=0.0)
    trainer = trainer_of(
        AsFTTrainer, tuned, args, safety_batch_size=2, unaligned=unaligned, penalty=0.3
    )
    trained = [p for p in tuned.parameters() if p.requires_grad]
    seen = []

    def look(step: int) -> None:
        squares = []
        for name, layer in layers:
            outside = torch.eye(len(layer.get_base_layer().weight)).double() - projection(
                layer, unaligned[f"{name}.weight"]
            )
            up, down = (side["default"].weight.double() for side in (layer.lora_B, layer.lora_A))
            squares.append(((layer.scaling["default"] * outside @ up @ down) ** 2).sum())
        loss = window_loss(tuned, trainer._window) + 0.3 * torch.stack(squares).sum()
        expected = torch.autograd.grad(loss, trained)
        actual = [p.grad for p in trained]
        torch.testing.assert_close(actual, list(expected), rtol=1e-3, atol=1e-4)
        seen.append(step)

    trainer.add_callback(BeforeEachUpdate(look))
    trainer.train()
    assert seen == list(range(4))
    # What is evaluated is the task alone.
    tuned.eval()
    batch = trainer._window[0]
    with torch.no_grad():
        assert torch.equal(trainer.compute_loss(tuned, batch), task_loss(tuned, batch))


def _without_lora(tuned: Any, unaligned: dict[str, Tensor]) -> tuple[nn.Module, Any]:
    return model(lora=False), unaligned


def _without_a_layer(tuned: Any, unaligned: dict[str, Tensor]) -> tuple[nn.Module, Any]:
    return tuned, dict(list(unaligned.items())[1:])


def _of_the_same_weights(tuned: Any, unaligned: dict[str, Tensor]) -> tuple[nn.Module, Any]:
    return tuned, tuned.get_base_model().state_dict() | {
        f"{name}.weight": layer.get_base_layer().weight
        for name, layer in tuned.get_base_model().named_modules()
        if hasattr(layer, "get_base_layer")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_lora, "no LoRA"),
        (_without_a_layer, "is missing; expected"),
        (_of_the_same_weights, "nothing was aligned"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, message: str) -> None:
    tuned, unaligned, _ = adapted()
    tuned, unaligned = change(tuned, unaligned)
    with pytest.raises(ValueError, match=message):
        project_onto_alignment(tuned, unaligned)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    tuned, unaligned, _ = adapted()
    with pytest.raises(ValueError, match="threshold"):
        project_onto_alignment(tuned, unaligned, 1.1)
    with pytest.raises(ValueError, match="penalty"):
        trainer_of(AsFTTrainer, tuned, arguments(tmp_path), unaligned=unaligned, penalty=-1.0)
