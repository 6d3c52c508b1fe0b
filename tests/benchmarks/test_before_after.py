"""Two versions of the package measured in turns: here one against itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import before_after
from benchmarks.before_after import Worker
from benchmarks.provenance import ROOT, commit
from tests.benchmarks.helpers import SURROUNDINGS, read

SERVE = ("--quick", "--serve", "full", "fp32", "blend")


def test_both_versions_are_measured_and_do_the_same(tmp_path: Path) -> None:
    arguments = ["--quick", "--minutes", "0", "--only", "full,blend", "--output", str(tmp_path)]
    assert before_after.main(["--before", str(ROOT), *arguments]) == 0
    (row,) = read(tmp_path / "before_after.csv")
    assert set(row) >= SURROUNDINGS
    assert row["before_commit"] == row["commit"] == commit()
    assert (row["setup"], row["method"], row["dtype"]) == ("full", "blend", "fp32")
    assert int(row["rounds"]) == before_after.LEAST_ROUNDS
    assert row["before_loss"] == row["after_loss"]
    # The same bytes of tensors, to the bit of a counter.
    assert float(row["tensors_ratio"]) == pytest.approx(1.0, abs=0.01)
    for version in before_after.VERSIONS:
        assert 0 < float(row[f"{version}_s"]) < 60
        # At least gradients and two moments of every parameter.
        assert float(row[f"{version}_tensors_mb"]) > 3 * 0.7
    assert float(row["time_q25"]) <= float(row["time_ratio"]) <= float(row["time_q75"])


@pytest.mark.slow
@pytest.mark.parametrize("method", before_after.METHODS)
@pytest.mark.parametrize("setup", ["lora", "full"])
def test_every_case_serves(setup: str, method: str) -> None:
    arguments = ("--quick", "--serve", setup, "fp32", method)
    with Worker(ROOT, arguments) as worker:
        assert worker.facts()["backend"] in ("native", "reference")
        for _ in range(2):
            assert worker.ask("step")["seconds"] > 0
        found = worker.ask("memory")
    assert found["tensors"] > 0 and found["loss"] > 0


def test_another_package_than_that_of_the_checkout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where the package is installed, and the checkout's own is not found.
    worker = object.__new__(Worker)
    worker._checkout = tmp_path
    monkeypatch.setattr(worker, "_answer", lambda: {"package": str(ROOT / "sap_fast")})
    with pytest.raises(RuntimeError, match="was to be measured, not"):
        worker.facts()


def test_a_version_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "sap_fast").mkdir()
    (tmp_path / "sap_fast" / "__init__.py").write_text("raise ImportError('too old')\n")
    with Worker(tmp_path, SERVE) as worker, pytest.raises(RuntimeError, match="too old"):
        worker.facts()


def test_versions_with_different_operations_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ready:
        def __init__(self, checkout: Path, arguments: object) -> None:
            self.checkout = checkout

        def __enter__(self) -> Ready:
            return self

        def __exit__(self, *_: object) -> None: ...

        def facts(self) -> dict[str, str]:
            return {"backend": "native" if self.checkout == ROOT else "reference"}

    monkeypatch.setattr(before_after, "Worker", Ready)
    case = before_after.Case("full", "4x96", "fp32", "tiny")
    checkouts = {"before": tmp_path, "after": ROOT}
    with pytest.raises(RuntimeError, match="build the extension in both checkouts"):
        before_after.measure(case, "sap", checkouts, SERVE, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--before None: expected a folder that holds sap_fast/"),
        (["--before", "nowhere"], "--before nowhere: expected a folder"),
        (["--before", str(ROOT), "--only", "fp8"], "--only fp8: no case has these words"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        before_after.main(arguments)
    assert message in capsys.readouterr().err


def test_rounds_end_at_the_deadline_after_as_many_first_turns_for_each() -> None:
    ended = list(before_after._rounds(0.0))
    assert len(ended) == before_after.WARM_UP_ROUNDS + before_after.LEAST_ROUNDS
    assert (len(ended) - before_after.WARM_UP_ROUNDS) % 2 == 0
