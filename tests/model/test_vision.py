"""Vision-language models: layers of the text are probed, images of a batch reach the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from tests.model.test_lower_forward_models import TEXT, batch, gemma3

#: What stands in the row for a part of the image, in both models.
IMAGE = 63


def llava() -> nn.Module:
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        image_token_index=IMAGE,
    )
    return T.LlavaForConditionalGeneration(config)


def with_images(seed: int, more: tuple[str, ...]) -> dict[str, Tensor]:
    """Rows that begin with an image of four tokens."""
    rows = batch(seed, more)
    rows["input_ids"][:, :4] = IMAGE
    for name in more:
        rows[name][:, :4] = 1
    generator = torch.Generator().manual_seed(seed)
    return rows | {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}


@pytest.mark.parametrize(
    ("make", "more"), [(llava, ()), (gemma3, ("token_type_ids",))], ids=["llava", "gemma3"]
)
def test_the_layers_of_the_text_are_probed_and_images_reach_the_model(
    make: Callable[[], Any], more: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = make().train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
    rows, chosen, rejected = (with_images(seed, more) for seed in (1, 2, 3))
    probes = ProbeSet(model, [1, 2], rho=1e-2)
    language: Any = model.model.language_model
    assert list(probes.modules.values()) == list(language.layers[1:3])

    def task() -> Tensor:
        loss = task_loss(model, rows)
        loss.backward()
        return loss

    def safety() -> Tensor:
        loss = contrastive_loss(model, chosen, rejected)
        loss.backward()
        return loss

    optimizer = FusedSAP(model.parameters(), probes, lr=1e-3)
    optimizer.step(task, safety)
    assert optimizer.metrics.skipped_steps == 0
    for h in probes.estimates.values():
        assert h.isfinite().all() and h.norm() > 0
    # Every part learns, the encoder of the images too.
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    with torch.no_grad():
        seen = task_loss(model, rows)
        others = task_loss(model, rows | {"pixel_values": rows["pixel_values"].flip(0)})
        expected = model(**rows).loss
    torch.testing.assert_close(seen, expected)
    assert not torch.equal(seen, others)
