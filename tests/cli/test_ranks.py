"""Commands under a launcher: `finetune` on every rank with one result, the others on the first."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from sap_fast.cli import finetune as finetune_module
from sap_fast.cli import main, ranks, sharding
from tests.cli.terminal import Terminal
from tests.ranks import RANKS, distance, on_ranks

ROOT = Path(__file__).resolve().parents[2]


def outcome(
    rank: int, command: list[str], breaks: str | None = None, sharded: bool = False
) -> list[Any]:
    """Runs a command on a rank: its exit status, and what it showed."""
    if breaks is not None:
        break_off(rank, breaks)
    if sharded:
        shard_on_cpus()
    sys.argv = ["sap-fast", *command]
    shown = io.StringIO()
    status: Any = 0
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code or 0
    return [status, shown.getvalue()]


#: What `accelerate launch` makes of a configuration for FSDP2.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def shard_on_cpus() -> None:
    """Lets Accelerate shard on CPU ranks. It asks for an accelerator, of which gloo needs none."""
    prepared: Any = PartialState
    prepared._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    accelerator: Any = sharding
    accelerator.accelerator_is_there = lambda: True
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu"} | FSDP2 | os.environ


def break_off(rank: int, where: str) -> None:
    """Lets a run be interrupted in its third step, or one rank fail before the first."""
    if where == "third step":
        recorder: Any = finetune_module._Recorder
        on_log = recorder.on_log

        def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_log(self, args, state, control, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

        recorder.on_log = interrupted
    elif rank == 1:

        def fail(*_: Any) -> None:
            raise RuntimeError("no memory left here")

        finetune_module.load_trained_model = fail  # type: ignore[assignment]


def on_all(
    tmp_path: Path, command: list[str], breaks: str | None = None, sharded: bool = False
) -> list[Any]:
    meeting = tmp_path / "ranks"
    meeting.mkdir(exist_ok=True)
    return on_ranks(meeting, outcome, command, breaks, sharded)


def weights(output: Path) -> list[Any]:
    saved = load_file(output / "adapter_model.safetensors")
    return [saved[name] for name in sorted(saved)]


def short(terminal: Terminal, output: Path, *more: str) -> list[str]:
    """A run whose batches are shared out: without dropout, whose masks would be other ones."""
    return terminal.finetuning(output, "--lora-dropout", "0", *more)


def test_finetune_on_two_ranks_is_that_on_one_with_the_same_batch(
    terminal: Terminal, tmp_path: Path
) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    # Full batches alone: the last rows of an epoch are shared out otherwise.
    task = Path(terminal.files["task"])
    task.write_text("".join(task.read_text().splitlines(keepends=True)[:8]))
    (status, shown), (other, silence) = on_all(tmp_path, short(terminal, together))
    assert (status, other) == (0, 0), shown
    assert "Done" in shown and silence == ""
    assert not list(tmp_path.glob("*.unfinished")) and not (together / "checkpoints").exists()
    rows = (together / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    assert json.loads((together / "run.json").read_text())["ranks"] == RANKS

    whole = ["--batch-size", "4", "--safety-batch-size", "4"]
    assert terminal.run(*short(terminal, alone, *whole)) == 0
    apart = distance(weights(together), weights(alone))
    assert apart <= 1e-3, apart
    half = tmp_path / "half"
    assert terminal.run(*short(terminal, half)) == 0
    assert distance(weights(half), weights(alone)) > 1e-1


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("sap", []),
        pytest.param("sap", ["--precision", "bf16-mixed"], marks=pytest.mark.slow),
        pytest.param("blend", [], marks=pytest.mark.slow),
        pytest.param("adamw", [], marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "lora",
)
def test_finetune_on_shards_of_accelerate_is_that_on_one_rank(
    terminal: Terminal, tmp_path: Path, optimizer: str, more: list[str]
) -> None:
    together, alone, plain = (tmp_path / name for name in ("together", "alone", "plain"))
    task = Path(terminal.files["task"])
    task.write_text("".join(task.read_text().splitlines(keepends=True)[:8]))
    command = short(terminal, together, "--optimizer", optimizer, *more)
    (status, shown), (other, silence) = on_all(tmp_path, command, sharded=True)
    assert (status, other, silence) == (0, 0, ""), shown
    # Accelerate shards the head apart from the model, and chunks would call the hooks of that.
    said = "Losses are computed from its own logits" in " ".join(shown.split())
    assert said == (optimizer != "adamw")

    whole = ["--batch-size", "4", "--safety-batch-size", "4", "--optimizer", optimizer, *more]
    assert terminal.run(*short(terminal, alone, *whole)) == 0
    apart = distance(weights(together), weights(alone))
    # FSDP2 also casts the adapter, and reduces gradients, in bf16.
    assert apart <= (0.2 if "bf16-mixed" in more else 1e-3), apart
    assert [t.dtype for t in weights(together)] == [t.dtype for t in weights(alone)]
    assert AutoPeftModelForCausalLM.from_pretrained(together) is not None
    if not more and optimizer == "sap":
        assert terminal.run(*short(terminal, plain, *whole[:-1], "adamw")) == 0
        assert distance(weights(plain), weights(alone)) > 1e-2


@pytest.mark.parametrize(
    ("asked", "more", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "asks for DeepSpeed.*use FSDP2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], "asks for Megatron-LM.*use FSDP2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "tensor, context"),
        (FSDP2 | {"FSDP_VERSION": "1"}, [], "asks for FSDP1.*set fsdp_version: 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, [], "fsdp_offload_params: true"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "give --checkpointing layers"),
        (FSDP2, ["--full"], "--full with FSDP: .*train an adapter"),
        (FSDP2, ["--save-every", "2"], "--save-every 2 with FSDP"),
        (FSDP2, ["--eval", "rows.jsonl"], "--eval rows.jsonl with FSDP"),
        (FSDP2, ["--load-in", "4bit"], "--load-in 4bit with FSDP"),
        (FSDP2, None, "no accelerator here.*MULTI_CPU"),
    ],
)
def test_what_a_configuration_of_accelerate_asks_for_in_vain_is_named(
    terminal: Terminal, tmp_path: Path, asked: dict[str, str], more: list[str] | None, words: str
) -> None:
    for name, value in asked.items():
        terminal.monkeypatch.setenv(name, value)
    there = more is not None
    terminal.monkeypatch.setattr(sharding, "accelerator_is_there", lambda: there)
    assert re.search(words, terminal.refusal(*short(terminal, tmp_path / "tuned", *(more or []))))


@pytest.mark.slow
def test_steps_of_as_many_tokens_have_the_rows_on_two_ranks_that_they_have_on_one(
    terminal: Terminal, tmp_path: Path
) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    task = Path(terminal.files["task"])
    rows = [{"prompt": f"Say {k}", "completion": "It is." * (1 + k % 2)} for k in range(16)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Rows of 7 and of 13 tokens: some steps have two micro-batches on a rank, some have one.
    steps = ["--tokens-per-step", "40", "--max-steps", "6"]
    (status, shown), (other, _) = on_all(tmp_path, short(terminal, together, *steps))
    assert (status, other) == (0, 0), shown
    whole = ["--safety-batch-size", "4"]
    assert terminal.run(*short(terminal, alone, *steps, *whole)) == 0
    apart = distance(weights(together), weights(alone))
    assert apart <= 1e-3, apart
    losses = [
        [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (together, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sap", "blend", "adamw"])
def test_a_run_on_ranks_goes_on_to_the_same_bits(
    terminal: Terminal, tmp_path: Path, optimizer: str
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    dropout = ["--optimizer", optimizer, "--lora-dropout", "0.1"]
    assert on_all(tmp_path, terminal.finetuning(straight, *dropout))[0][0] == 0
    command = terminal.finetuning(resumed, "--save-every", "2", *dropout)
    (status, shown), (other, _) = on_all(tmp_path, command, "third step")
    assert (status, other) == (130, 130) and "The same command goes on" in shown
    assert not resumed.exists()

    assert terminal.run(*command) == 2
    assert "was begun on 2 rank(s), and these are 1" in " ".join(terminal.shown.split())

    (status, shown), (other, silence) = on_all(tmp_path, command)
    assert (status, other, silence) == (0, 0, ""), shown
    assert "Going on from checkpoint-2" in shown
    for name in ("adapter_model.safetensors",):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
    rows = (resumed / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_ends_all_and_leaves_nothing(
    terminal: Terminal, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "tuned"
    command = short(terminal, output)
    folder = tmp_path / "ranks"
    folder.mkdir()
    with pytest.raises(Exception, match="no memory left here"):
        on_all(tmp_path, command, "preparation")
    assert not output.parent.exists()

    # A mistake of the user's is one line, by the first rank.
    output.mkdir(parents=True)
    (status, shown), (other, silence) = on_all(tmp_path, command)
    assert (status, other, silence) == (2, 2, "")
    assert "exists already" in " ".join(shown.split())
    (status, shown), (other, silence) = on_all(tmp_path, [*command, "--epochs", "many"])
    assert (status, other, silence) == (2, 2, "")
    assert "--epochs" in shown


GIVEN = ["--model", "m", "--task", "t.jsonl", "--output", "o"]


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (["evaluate", "--help"], 0, "evaluate runs on one rank; the other 3 leave"),
        (["doctor", "--help"], 0, "doctor runs on one rank; the other 3 leave"),
        (["landscape", "--help"], 0, "landscape runs on one rank; the other 3 leave"),
        (["compare", "--help"], 2, "compare on 4 ranks: it starts a process of its own"),
        (["finetune", "--help"], 0, ""),
        (["finetune", *GIVEN, "--print-config"], 0, ""),
    ],
)
def test_other_commands_run_on_the_first_rank_alone(
    terminal: Terminal, command: list[str], status: int, words: str
) -> None:
    terminal.monkeypatch.setenv("WORLD_SIZE", "4")
    terminal.monkeypatch.setenv("RANK", "0")
    assert terminal.run(*command) == status
    assert words in " ".join(terminal.shown.split())
    terminal.monkeypatch.setenv("RANK", "1")
    terminal.monkeypatch.setattr(sys, "argv", ["sap-fast", *command])
    main()
    assert terminal.capsys.readouterr() == ("", "")


def test_one_variable_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.count() == 1 and ranks.is_first()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert ranks.count() == 1 and ranks.is_first()
    monkeypatch.setenv("RANK", "3")
    assert ranks.count() == 8 and ranks.rank() == 3 and not ranks.is_first()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_it(terminal: Terminal, tmp_path: Path, launcher: str) -> None:
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        "accelerate": [
            # With --cpu it starts one process, unless there is MPI.
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            "--module",
        ],
    }[launcher]
    output = tmp_path / "tuned"
    command = [sys.executable, "-m", *start, "sap_fast.cli", *short(terminal, output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Done: ") == 1
    assert json.loads((output / "run.json").read_text())["ranks"] == 2


#: As `accelerate config` writes it.
CONFIGURATION = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
machine_rank: 0
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""


@pytest.mark.slow
def test_a_configuration_for_fsdp2_is_launched(terminal: Terminal, tmp_path: Path) -> None:
    task = Path(terminal.files["task"])
    task.write_text("".join(task.read_text().splitlines(keepends=True)[:8]))
    together, alone, configuration = (tmp_path / name for name in ("t", "a", "fsdp2.yaml"))
    configuration.write_text(CONFIGURATION)
    launch = ["accelerate.commands.launch", "--config_file", str(configuration), "--module"]
    command = [*launch, "tests.cli.sharded_on_cpus", *short(terminal, together)]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Done: ") == 1
    whole = ["--batch-size", "4", "--safety-batch-size", "4"]
    assert terminal.run(*short(terminal, alone, *whole)) == 0
    assert distance(weights(together), weights(alone)) <= 1e-3
