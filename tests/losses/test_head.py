from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from sap_fast.losses import contrastive_loss, head, task_loss
from tests.losses.helpers import (
    ROWS_PER_CHUNK,
    VOCABULARY,
    EmbeddingModel,
    LargestTensor,
    assert_same,
    build,
    build_odd,
    gradients,
    make_batch,
    peak_bytes,
    with_lora,
)
from tests.oracle import naive_contrastive_loss, naive_task_loss

pytestmark = pytest.mark.usefixtures("several_chunks", "no_fallback_unnoticed")


def test_a_gpu_gets_larger_chunks():
    sizes = {device: head.CHUNK_BYTES[device] // (4 * VOCABULARY) for device in ("cpu", "cuda")}
    assert sizes["cuda"] > sizes["cpu"] == ROWS_PER_CHUNK
    for device, expected in {"cpu": sizes["cpu"], "meta": sizes["cuda"]}.items():
        rows = torch.empty(1, 1, dtype=torch.bfloat16, device=device)
        assert head._chunk_size(rows, VOCABULARY) == expected


@pytest.mark.parametrize(
    "head", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_peft_adapters_on_the_head(head):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | head)
    model = get_peft_model(build(), config).eval()
    batch = make_batch()
    ours, own = task_loss(model, batch), model(**batch).loss
    assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model))


@pytest.mark.parametrize("trained", ["lm_head", "q_proj"])
def test_dropout_in_the_head_is_the_same_in_forward_and_backward(trained):
    targets = ["lm_head", "q_proj"]
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(build(), config).double().train()
    batch = make_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"{trained}.lora_A" in name)
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def loss():
        torch.manual_seed(3)
        return task_loss(model, batch)

    (gradient,) = torch.autograd.grad(loss(), parameter)
    # The norms between q_proj and the loss compute in fp32: a longer step, and less exact.
    size, tolerance = (1e-5, 1e-6) if trained == "lm_head" else (1e-3, 1e-3)
    step = size * gradient / gradient.norm()
    with torch.no_grad():
        parameter.add_(step)
        above = loss()
        parameter.sub_(2 * step)
        below = loss()
    torch.testing.assert_close(
        (above - below) / (2 * size), gradient.norm(), rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("trained", ["adapters", "everything"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "granite", "cohere"])
def test_the_head_runs_once_forward_and_backward(family, trained):
    model, batch = build(family), make_batch()
    if trained == "adapters":
        model = with_lora(model)
    own = model(**batch).loss
    task_loss(model, batch)  # tests the model
    with LargestTensor() as largest:
        ours = task_loss(model, batch)
        found = gradients(ours, model)
    assert_same(ours, own, rtol=2e-6)
    assert_same(found, gradients(own, model))
    chunks = -(-16 // ROWS_PER_CHUNK)
    assert largest.counts[torch.ops.aten._log_softmax.default] == chunks
    assert largest.counts[torch.ops.aten._log_softmax_backward_data.default] == chunks
    with LargestTensor() as largest, torch.no_grad():
        task_loss(model, batch)
    assert torch.ops.aten._log_softmax_backward_data.default not in largest.counts


def test_a_hook_of_a_frozen_head_may_train():
    model, batch = with_lora(build()), make_batch()
    scale = nn.Parameter(torch.ones(VOCABULARY))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: scale * output)
    (ours,) = torch.autograd.grad(task_loss(model, batch, pack=False), scale)
    assert_same(ours, torch.autograd.grad(model(**batch).loss, scale)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_a_frozen_head_is_as_exact_as_one_that_runs_again(dtype, monkeypatch):
    exact_model, batch = with_lora(build(initializer_range=0.3)), make_batch()
    autocast = dtype == "autocast"
    model = with_lora(build(initializer_range=0.3)).to(torch.float32 if autocast else dtype)

    def run(model, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = contrastive_loss(model, batch, make_batch(seed=1))
        return loss, torch.cat([g.flatten().float() for g in gradients(loss, model)])

    exact = run(exact_model, False)
    ours = run(model, autocast)
    monkeypatch.setattr(head, "_is_hooked", lambda head: True)
    again = run(model, autocast)
    for fast, reference, value in zip(ours, again, exact, strict=True):
        assert (fast - value).norm() <= 1.1 * (reference - value).norm() + 1e-3 * value.norm()


def test_the_gradient_of_a_frozen_heads_rows_is_multiplied_in_fp32():
    rows = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([3.0, 5.0])
    incoming = torch.tensor([1.003, 0.7071, -1 / 3, 1.0])

    def log_probs(rows, targets):
        return (rows * weight).sum(1)

    ours = head._FrozenHead.apply(rows, torch.zeros(4), 3, log_probs)
    (gradient,) = torch.autograd.grad(ours, rows, incoming)
    assert torch.equal(gradient, (incoming[:, None] * weight).bfloat16())


def test_autocast_casts_a_frozen_head_once_for_all_chunks():
    model, batch = with_lora(build()), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        task_loss(model, batch)
        with LargestTensor() as largest:
            task_loss(model, batch)
    # One for the model's own call, one for the chunks.
    assert largest.copies[VOCABULARY, 32] == 2


def test_the_head_is_given_one_position_without_strides():
    model, contiguous = build(), []
    model.lm_head.register_forward_pre_hook(
        lambda module, args: contiguous.append(args[0].is_contiguous())
    )
    task_loss(model, make_batch(), pack=False)
    assert all(contiguous)


def test_unknown_softcap_of_a_new_model_is_noticed():
    model = build_odd("softcapped")
    nn.init.zeros_(model.lm_head.weight)
    with pytest.warns(UserWarning, match="OddLlama"):
        task_loss(model.bfloat16(), make_batch())


def test_settings_of_a_multi_modal_model_are_those_of_its_language_model():
    class MultiModal(EmbeddingModel):
        config = SimpleNamespace(
            get_text_config=lambda decoder: SimpleNamespace(logits_scaling=0.5)
        )

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).logits / 0.5

    model, batch = MultiModal(), make_batch()
    logits = model(batch["input_ids"], batch["attention_mask"])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert_same(task_loss(model, batch), expected, rtol=2e-6)


def test_a_models_head_is_tested_at_its_first_use_only(monkeypatch):
    outputs = []
    model, batch = build(), make_batch()
    model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    for training in (False, True, False, True):
        model.train(training)
        task_loss(model, batch, pack=False)
    # In each mode the model's own loss of a few tokens, then their log-probabilities, with which
    # the head is tested; and the loss.
    lengths = [logits.shape[:2] for logits in outputs]
    assert lengths == 2 * [(2, 8), (2, 1), (3, 1)] + 2 * [(3, 1)]
    numbers = torch.linspace(-64, 64, VOCABULARY)
    tested = [torch.allclose(logits, numbers.expand_as(logits)) for logits in outputs]
    assert tested == 2 * [False, True, False] + 2 * [False]


def hooks_of(model):
    return [
        (name, list(module._forward_pre_hooks), list(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model.layers.1", "lm_head"])
def test_hooks_are_removed_on_any_exit(where, error):
    model, batch = build(), make_batch()

    def fail(*_):
        raise error("stop")

    before = hooks_of(model)
    with model.get_submodule(where).register_forward_hook(fail), pytest.raises(error, match="stop"):
        task_loss(model, batch)
    assert hooks_of(model) == before
    loss = task_loss(model, batch)
    assert hooks_of(model) == before
    assert_same(loss, model(**batch).loss, rtol=2e-6)


def test_other_hooks_of_the_head_act_once():
    model, batch = build(), make_batch()
    model.lm_head.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model.lm_head.register_forward_hook(lambda module, args, output: 5 * output)
    assert_same(task_loss(model, batch, pack=False), model(**batch).loss, rtol=2e-6)


@pytest.mark.parametrize("loss_name", ["task", "contrastive"])
def test_full_logits_never_exist(loss_name, monkeypatch):
    vocabulary, rows_per_chunk = 128_000, 16
    chunk = rows_per_chunk * vocabulary
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * chunk)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=True,
        )
    )
    input_ids = torch.randint(vocabulary, (2, 100))
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids,
    }

    def run():
        if loss_name == "task":
            task_loss(model, batch, pack=False).backward()
        else:
            contrastive_loss(model, batch, batch, pack=False).backward()

    with LargestTensor() as largest:
        run()
    assert torch.ops.aten._log_softmax_backward_data.default in largest.counts
    assert largest.elements == chunk
    # Of the 12 chunks' worth of logits in the batch: those of one chunk, log-softmax, their two
    # gradients, and the gradient of the embeddings (8 columns for a chunk's 16) twice.
    assert 2 * 4 * chunk < peak_bytes(run) < 5 * 4 * chunk
    assert peak_bytes(lambda: model(**batch).loss.backward()) > 24 * 4 * chunk


def test_a_chunk_has_at_least_one_row(monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    model, batch = build(), make_batch()
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)


def record_head_dtypes(model):
    dtypes = []
    model.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    return dtypes


@pytest.mark.parametrize("opened_by", ["caller", "accelerate"])
def test_autocast_holds_for_the_chunks_in_forward_and_backward(opened_by):
    model, batch = build(), make_batch()
    if opened_by == "caller":
        with torch.autocast("cpu", torch.bfloat16):
            own = model(**batch).loss
            task_loss(model, batch, pack=False)  # tests the model
            dtypes = record_head_dtypes(model)
            ours = task_loss(model, batch, pack=False)
    else:
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        own = model(**batch).loss
        task_loss(model, batch, pack=False)
        dtypes = record_head_dtypes(model)
        ours = task_loss(model, batch, pack=False)
    forward_calls = len(dtypes)
    gradients(ours, model)
    assert ours.dtype == torch.float32
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 2 * forward_calls - 1  # all but the model's own call run again
    # Not farther from fp32 than the model's own bf16 computation: chunks add up in fp32.
    exact_model = build()
    exact = exact_model(**batch).loss
    assert (ours - exact).abs() <= (own - exact).abs() + 1e-4
    for ours_one, own_one, exact_one in zip(
        gradients(ours, model), gradients(own, model), gradients(exact, exact_model), strict=True
    ):
        assert (ours_one - exact_one).norm() <= 1.1 * (own_one - exact_one).norm()


@pytest.mark.parametrize("trained", ["everything", "adapters"])
@pytest.mark.parametrize("loss_name", ["task", "contrastive"])
def test_double_backward_in_fp64(loss_name, trained):
    model = build(attn_implementation="eager").double()
    if trained == "adapters":
        model = with_lora(model).double()
    chosen, rejected = make_batch(), make_batch(seed=1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # The norms and the softmax of Llama compute in fp32 in an fp64 model, too, and how these round
    # depends on the length of a row. So the reference, too, has to run the padded batch: with each
    # row by itself it was off by 4e-9 with AVX2 (not without vectors), and the gradient by 2e-7.
    if loss_name == "task":
        ours, plain = task_loss(model, chosen, pack=False), naive_task_loss(model, chosen)
    else:
        ours = contrastive_loss(model, chosen, rejected, pack=False)
        plain = naive_contrastive_loss(model, chosen, rejected)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=0)

    def hessian_vector_product(loss):
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        generator = torch.Generator().manual_seed(2)
        vectors = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in first]
        product = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
        return first, torch.autograd.grad(product, parameters)

    # Measured: 5e-16.
    assert_same(hessian_vector_product(ours), hessian_vector_product(plain), rtol=1e-13)


@pytest.mark.parametrize("what", ["wrapped", "in place", "head"])
def test_compiled_models_are_left_unhooked(what):
    torch._dynamo.reset()
    plain, batch = EmbeddingModel(), make_batch()
    expected = task_loss(plain, batch)
    model = EmbeddingModel()
    if what == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        (model if what == "in place" else model.head).compile(backend="eager")
    with pytest.warns(UserWarning, match="^EmbeddingModel: it is compiled") as caught:
        ours = task_loss(compiled, batch)
    assert len(caught) == 1
    assert_same(ours, expected, rtol=2e-6)
    assert_same(task_loss(compiled, batch), expected, rtol=2e-6)
    logits = compiled(batch["input_ids"], batch["attention_mask"]).logits
    assert logits.shape == (3, 12, VOCABULARY)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed_data_parallel(process_group, find_unused_parameters):
    plain, batch = build(), make_batch()
    expected = gradients(plain(**batch).loss, plain)
    model = build()
    wrapped = nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=find_unused_parameters
    )
    for _ in range(2):  # the first use of a model also tests its head
        model.zero_grad()
        task_loss(wrapped, batch).backward()
        assert_same([p.grad for p in model.parameters()], expected)
