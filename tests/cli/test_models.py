"""Models and adapters that cannot be used, and code that does not run unasked."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sap_fast.cli import models as models_module
from sap_fast.cli import pairs as pairs_module
from sap_fast.cli.console import console
from sap_fast.cli.finetune import load_trained_model
from sap_fast.cli.models import load_model, resolved_precision
from sap_fast.cli.settings import FinetuneSettings
from tests.cli.terminal import Terminal


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_pickled(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def without_turn_end(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", eos_token=None)


def with_own_code(folder: Path) -> None:
    """A class of its own, whose module leaves a file when it runs."""
    (folder / "own.py").write_text(
        f"open({str(folder / 'it ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own", auto_map=classes)


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "own code": (with_own_code, "runs only with --trust-remote-code"),
    "pickled weights": (only_pickled, "no file named model.safetensors"),
    "cut weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5_000),
        "cannot be loaded",
    ),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config of another kind": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "cannot be loaded",
    ),
    "other shapes": (
        lambda folder: change_json(folder / "config.json", hidden_size=64),
        "cannot be loaded",
    ),
    "unknown architecture": (
        lambda folder: change_json(folder / "config.json", model_type="unheard"),
        "unheard",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "cannot be loaded",
    ),
    "no tokenizer": (without_tokenizer, "cannot be loaded"),
    "no end of turns": (without_turn_end, "neither a chat template nor an eos_token"),
    "broken template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"),
        "the chat template rejects",
    ),
    "failing template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 + messages[0].role }}"),
        "the chat template rejects",
    ),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "cannot be loaded"),
}


@pytest.mark.parametrize("damage", BAD_MODELS)
def test_a_bad_model_is_one_line_and_leaves_nothing(
    terminal: Terminal, tmp_path: Path, damage: str
) -> None:
    model = shutil.copytree(terminal.chat_model, tmp_path / "model")
    change, message = BAD_MODELS[damage]
    change(model)
    for command in ("finetune", "evaluate", "compare", "doctor"):
        line = terminal.refusal(*terminal.command(command, tmp_path / "out", "--model", str(model)))
        assert line.startswith(f"Error: --model {model}: ") and message in line


@pytest.mark.parametrize(
    "command", ["finetune", "pairs", "evaluate", "compare", "doctor", "landscape"]
)
def test_a_model_that_is_not_there_is_one_line(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    more = ["--model", "no/such/folder"]
    line = terminal.refusal(*terminal.command(command, tmp_path / "out.jsonl", *more))
    assert "--model no/such/folder: cannot be loaded" in line


def test_code_of_a_model_runs_where_it_is_asked_for(terminal: Terminal, tmp_path: Path) -> None:
    terminal.monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    terminal.monkeypatch.setattr(sys, "path", [*sys.path])
    model = shutil.copytree(terminal.chat_model, tmp_path / "model")
    with_own_code(model)
    arguments = ["doctor", "--model", str(model), "--full"]
    terminal.refusal(*arguments)
    assert not (model / "it ran").exists()
    assert terminal.run(*arguments, "--trust-remote-code") == 0
    assert (model / "it ran").exists()


def test_an_adapter_is_read_from_safetensors_only(terminal: Terminal, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    assert terminal.run(*terminal.finetuning(adapter, "--max-steps", "1")) == 0
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    content = weights.read_bytes()
    weights.unlink()
    arguments = ["evaluate", "--model", str(adapter), "--task", terminal.files["task"]]
    arguments += ["--harmful", "none"]
    assert "has no adapter_model.safetensors" in terminal.refusal(*arguments)
    weights.write_bytes(content[:-100])
    assert f"--model {adapter}: cannot be loaded" in terminal.refusal(*arguments)
    weights.write_bytes(content)
    assert terminal.run(*arguments) == 0
    for changes in ({"base_model_name_or_path": "no/such/folder"}, {"peft_type": "UNHEARD"}):
        change_json(adapter / "adapter_config.json", **changes)
        assert f"--model {adapter}: cannot be loaded" in terminal.refusal(*arguments)


needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
QUANTIZED = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}


def kinds(model: torch.nn.Module) -> set[str]:
    """The classes of the linear layers of the decoder, below adapters."""
    linear = (m for name, m in model.named_modules() if "_proj" in name)
    return {type(m).__name__ for m in linear if hasattr(m, "weight") and m.weight.dim() == 2}


@needs_bitsandbytes
@pytest.mark.parametrize("load_in", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_an_adapter_on_a_quantized_base_is_trained_and_its_base_loads_again(
    terminal: Terminal, tmp_path: Path, load_in: str
) -> None:
    output = tmp_path / "tuned"
    options = ["--load-in", load_in, "--max-steps", "2"]
    assert terminal.run(*terminal.finetuning(output, *options)) == 0, terminal.shown
    assert "float16" not in terminal.shown  # the note that bitsandbytes repeats
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sap/skipped_steps"] == 0 and row["sap/lean"] > 0 for row in rows)
    assert json.loads((output / "run.json").read_text())["settings"]["load_in"] == load_in

    # The adapter on its base as it is stored, and as it was trained.
    assert "Linear4bit" not in kinds(AutoPeftModelForCausalLM.from_pretrained(output))
    adapted, _ = load_model(str(output), "fp32", load_in=load_in)
    assert QUANTIZED[load_in] in kinds(adapted)
    assert any(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    arguments = ["evaluate", "--model", str(output), "--task", terminal.files["task"]]
    losses = []
    for more in ([], ["--load-in", load_in]):
        result = tmp_path / f"result{len(losses)}.json"
        assert terminal.run(*arguments, *more, "--output", str(result)) == 0
        losses.append(json.loads(result.read_text())["result"]["task_loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


@needs_bitsandbytes
@pytest.mark.parametrize("load_in", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_the_model_that_makes_pairs_is_quantized(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_in: str
) -> None:
    asked: list[torch.nn.Module] = []

    def refuse(model: torch.nn.Module, tokenizer: Any, prompts: Any, **_: Any) -> list[str]:
        asked.append(model)
        return ["I can't."] * len(prompts)

    monkeypatch.setattr(pairs_module, "own_refusals", refuse)
    output = tmp_path / "pairs.jsonl"
    assert terminal.run(*terminal.command("pairs", output, "--load-in", load_in)) == 0
    assert QUANTIZED[load_in] in kinds(asked[0]) and output.exists()


@pytest.mark.parametrize("command", ["pairs", "evaluate", "finetune", "compare", "doctor"])
def test_every_command_that_quantizes_takes_the_same_words(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    arguments = terminal.command(command, tmp_path / "made.jsonl", "--load-in", "3bit")
    assert "--load-in 3bit: expected 4bit or 8bit" in terminal.refusal(*arguments)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("precision", "computed"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        pytest.param("bf16-mixed", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_4_bit_base_is_what_qlora_says(
    terminal: Terminal, precision: str, computed: torch.dtype
) -> None:
    settings = FinetuneSettings(
        model=str(terminal.chat_model),
        load_in="4bit",
        precision=precision,
        lora_target="all-linear",
    )
    model: Any = load_trained_model(settings)[0]
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert layer.compute_dtype == computed
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert kinds(model) == {"Linear4bit", "Linear"}  # the adapter's


@needs_bitsandbytes
def test_what_cannot_be_quantized_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    def refusal(command: str, *more: str) -> str:
        return terminal.refusal(*terminal.command(command, tmp_path / "out", *more))

    full = "--load-in 4bit: quantized weights cannot be trained"
    assert full in refusal("finetune", "--load-in", "4bit", "--full")
    for command in ("finetune", "evaluate"):
        line = refusal(command, "--load-in", "3bit")
        assert "--load-in 3bit: expected 4bit or 8bit" in line
    quantized = tmp_path / "quantized"
    AutoModelForCausalLM.from_pretrained(
        terminal.chat_model, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    ).save_pretrained(quantized)
    AutoTokenizer.from_pretrained(terminal.chat_model).save_pretrained(quantized)
    stored = ["--model", str(quantized)]
    assert "are quantized and cannot be trained" in refusal("finetune", *stored, "--full")
    assert "are quantized and cannot be moved" in refusal("landscape", *stored)
    arguments = terminal.finetuning(tmp_path / "tuned", "--max-steps", "1", model=quantized)
    assert terminal.run(*arguments) == 0, terminal.shown
    terminal.monkeypatch.setattr(models_module, "find_spec", lambda name: None)
    line = refusal("finetune", "--load-in", "8bit")
    assert "--load-in 8bit: needs bitsandbytes: pip install 'sap-fast[qlora]'" in line


@needs_bitsandbytes
def test_doctor_says_which_rho_survives_on_a_4_bit_base(terminal: Terminal) -> None:
    terminal.monkeypatch.setattr(console, "width", 120)
    model = ["doctor", "--model", str(terminal.chat_model), "--load-in", "4bit"]
    assert terminal.run(*model, "--precision", "bf16") == 0
    shown = " ".join(terminal.shown.split())
    # Adapters are in fp32 and compute in it, on a base that is not perturbed.
    assert "torch.float32, multiplied in torch.float32, on weights in 4bit that stay" in shown
    assert "lost to rounding" not in shown
    assert terminal.run(*model, "--precision", "bf16-mixed") == 0
    assert "torch.float32, multiplied in torch.bfloat16" in " ".join(terminal.shown.split())


ROOT = Path(__file__).parents[2]


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Every call in the package and its benchmarks: place, function and keyword arguments."""
    for path in sorted([*ROOT.glob("sap_fast/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {each.arg or "**": ast.unparse(each.value) for each in node.keywords}
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield place, ast.unparse(node.func), given


def test_nothing_is_unpickled_and_no_remote_code_runs_unasked() -> None:
    models = 0
    for place, function, given in calls():
        name = function.rsplit(".", 1)[-1]
        assert function not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), place
        if function == "torch.load" or name == "load_state_dict_from_url":
            assert given.get("weights_only") == "True", place
        # Nothing but the user's own word: the default of every function that takes it is False.
        assert given.get("trust_remote_code", "False") in (
            *("False", "trust_remote_code"),
            *("settings.trust_remote_code", "self.settings.trust_remote_code"),
        ), place
        if name == "from_pretrained" and place.startswith("sap_fast"):
            if "Tokenizer" not in function and "Config" not in function:
                assert given.get("use_safetensors") == "True", place
                models += 1
    assert models > 0
    assert inspect.signature(load_model).parameters["trust_remote_code"].default is False
    assert FinetuneSettings.trust_remote_code is False


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [
        *(("cpu", True, "fp32"), ("mps", True, "fp32"), ("cuda", True, "bf16-mixed")),
        *(("cuda", False, "fp32"), ("xpu", False, "bf16-mixed")),
    ],
)
def test_auto_is_mixed_where_the_accelerator_has_bf16(
    monkeypatch: pytest.MonkeyPatch, device: str, bf16: bool, expected: str
) -> None:
    monkeypatch.setattr("sap_fast.cli.models.default_device", lambda: torch.device(device))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    assert resolved_precision("auto") == expected
    assert resolved_precision("bf16") == "bf16"


def test_attention_is_that_which_is_asked_for(chat_model: Path) -> None:
    for attention in ("eager", "sdpa"):
        model: Any = load_model(str(chat_model), "fp32", attention=attention)[0]
        assert model.config._attn_implementation == attention


def tied(chat_model: Path, folder: Path) -> Path:
    """A copy of the model whose head is its embeddings."""
    shutil.copytree(chat_model, folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    saved = load_file(folder / "model.safetensors")
    del saved["lm_head.weight"]
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
def test_whole_modules_are_trained_beside_the_adapter_and_load(
    terminal: Terminal, tmp_path: Path, is_tied: bool
) -> None:
    if is_tied and "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this version of peft would save head and embeddings apart, and is refused")
    model = tied(terminal.chat_model, tmp_path / "tied") if is_tied else terminal.chat_model
    output, merged = tmp_path / "tuned", tmp_path / "merged"
    # Of two that are one matrix, either names both.
    more = ["--modules-to-save", "lm_head" if is_tied else "lm_head,embed_tokens"]
    arguments = terminal.finetuning(output, "--max-steps", "1", *more, model=model)
    assert terminal.run(*arguments) == 0, terminal.shown
    adapted = AutoPeftModelForCausalLM.from_pretrained(output).get_base_model()
    before = AutoModelForCausalLM.from_pretrained(model)
    ends = [adapted.get_input_embeddings().weight, adapted.get_output_embeddings().weight]
    assert torch.equal(*ends) == is_tied
    assert not torch.equal(ends[0], before.get_input_embeddings().weight)
    assert not torch.equal(ends[1], before.get_output_embeddings().weight)

    # The merged model is checked by loading it, without PEFT.
    assert terminal.run("merge", "--model", str(output), "--output", str(merged)) == 0
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.equal(loaded.get_output_embeddings().weight, ends[1])


def test_modules_that_cannot_be_saved_are_refused_by_name(
    terminal: Terminal, tmp_path: Path
) -> None:
    def refusal(saved: str, *more: str, model: Path | None = None) -> str:
        given = ["--modules-to-save", saved, *more]
        line = terminal.refusal(*terminal.finetuning(tmp_path / "tuned", *given, model=model))
        assert line.startswith(f"Error: --modules-to-save {saved}: ")
        return line

    line = refusal("lm_head,wte")
    assert line.endswith("is called 'wte'; expected such as embed_tokens, lm_head")
    assert "--full trains every module; leave it out" in refusal("lm_head", "--full")
    with terminal.monkeypatch.context() as patched:
        fields = dict(LoraConfig.__dataclass_fields__)
        fields.pop("ensure_weight_tying", None)
        patched.setattr(LoraConfig, "__dataclass_fields__", fields)
        line = refusal("lm_head", model=tied(terminal.chat_model, tmp_path / "tied"))
        assert "head and embeddings share their weights" in line
    adapter = tmp_path / "adapter"
    assert terminal.run(*terminal.finetuning(adapter, "--max-steps", "1")) == 0
    assert "is an adapter, which is trained as it is" in refusal("lm_head", model=adapter)
