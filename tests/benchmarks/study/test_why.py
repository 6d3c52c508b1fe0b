"""What the probe does to the gradient, beside what blending does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.study import why


def test_the_probe_leans_away_from_harm_and_a_random_one_does_not(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(why, "WORK", tmp_path)
    monkeypatch.setattr(why, "aligned_smollm2", lambda: chat_model)
    monkeypatch.setattr(why, "LOOK_EVERY", 2)
    monkeypatch.setattr(why, "SIZES", (1e-5, 1e-4))  # where it acts in proportion to its size
    monkeypatch.setattr(why, "SIZE_OF_ONE", 1e-4)
    monkeypatch.setattr(why, "SIZE_OF_SHAPES", 1e-4)
    monkeypatch.setattr(why, "DRAWN", 1)
    monkeypatch.setattr(why, "COMBINED", (1, 2, 3))
    rows, layers, shapes = why.measure(4)
    assert len(rows) == 8
    for step in (1, 3):
        mine = {
            kind: [row for row in rows if (row["step"], row["probe"]) == (step, kind)]
            for kind in ("sap", "random")
        }
        small, large = (row["lean"] for row in mine["sap"])
        assert small > 0 and large == pytest.approx(10 * small, rel=0.1)
        assert mine["sap"][0]["cosine"] > 0.2 > abs(mine["random"][0]["cosine"])
        for row in (*mine["sap"], *mine["random"]):
            assert row["cosine"] == pytest.approx(row["lean"] / row["change"])
            assert 0 < row["change"] and row["slope"] == mine["sap"][0]["slope"]
    assert [row["layer"] for row in layers] == [0, 1, 2] * 2
    for row in layers:
        # The tiny model embeds padding as zeros: there a probe of any size in layer 0 is large.
        assert row["lean"] > 0 or row["layer"] == 0
        assert -1 <= row["other_batch"] < 0.99
    assert len({row["lean"] for row in layers}) == len({row["other_batch"] for row in layers}) == 6
    by_shape = {step: {} for step in (1, 3)}
    for row in shapes:
        by_shape[row["step"]][row["shape"]] = row["cosine"]
    for cosines in by_shape.values():
        assert list(cosines)[:5] == [
            "normalized",
            "gradient",
            "three layers",
            "whitened",
            "divided",
        ]
        bounds = [cosines[f"best of {count}"] for count in why.COMBINED]
        assert bounds[0] < bounds[1] < bounds[2] <= 1
        # The middle of three layers is one layer, where the first change is that of h itself.
        assert bounds[0] == pytest.approx(cosines["gradient"], rel=0.02)
        assert cosines["normalized"] == pytest.approx(cosines["three layers"])
    why.draw_layers(layers, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_what_adamw_and_other_pairs_leave_of_blending_is_all_of_it() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([parameter], lr=0.0)
    gradients = torch.rand(3, 5)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    weights = 0.999 ** torch.arange(2, -1, -1.0)
    root = ((weights @ gradients**2) / weights.sum()).sqrt() + 1e-8
    torch.testing.assert_close(why.moment_root(optimizer, parameter), root)
    direction, other = (torch.nn.functional.normalize(torch.rand(5), dim=0) for _ in range(2))
    shares = why.shares_of_blending([0.3 * direction], [direction], [other], [root])
    assert shares == pytest.approx((1.0, 1.0))
    # A change where AdamW divides by more leaves less.
    change = torch.zeros(5)
    change[root.argmax()] = 1.0
    assert why.shares_of_blending([change], [direction], [other], [root])[0] < 1
