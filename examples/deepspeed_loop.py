"""SAP with LoRA under DeepSpeed's ZeRO, in a loop of one's own.

deepspeed --num_gpus 8 examples/deepspeed_loop.py --model Qwen/Qwen3-8B --stage 3
torchrun --nproc-per-node 2 examples/deepspeed_loop.py --tiny
"""

import argparse

import torch
import torch.distributed as dist
from common import load_model, parser, safety_pairs, task_batches
from peft import LoraConfig, get_peft_model

from sap_fast import ProbeSet, contrastive_loss, task_loss

MICRO_BATCHES = 2


def train(options: argparse.Namespace) -> None:
    """Train on every rank; save and go on from `options.checkpoint`."""
    import deepspeed

    from sap_fast.integrations.deepspeed import ZeroPasses

    deepspeed.init_distributed()
    rank = dist.get_rank()
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(load_model(options), lora)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": torch.cuda.is_available()},
        "zero_optimization": {"stage": options.stage},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    passes = ZeroPasses(engine, ProbeSet(model), safety_weight=0.0)
    pairs = safety_pairs(model, rank)

    def task(part):
        """Run forward and backward on micro-batches; the engine divides by their number."""
        losses = []
        for rows in part:
            loss = task_loss(engine, rows)
            engine.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def safety():
        """Run forward and backward on the next pairs, of which there is one batch in a step."""
        loss = contrastive_loss(engine, *next(pairs))
        engine.backward(loss, scale_wrt_gas=False)
        return loss

    batches = task_batches(model, options.steps * MICRO_BATCHES, rank)
    for step, window in enumerate(zip(*[batches] * MICRO_BATCHES, strict=True)):
        passes.inner_passes(task, safety, list(window))
        for rows in window:
            with passes.task_pass() as record:
                loss = task_loss(engine, rows)
                engine.backward(loss)
                record(loss / MICRO_BATCHES)
            engine.step()  # blends and updates once the window is complete
        if rank == 0:
            print(f"step {step + 1}: task loss {passes.metrics.task_loss:.4f}", flush=True)


options_parser = parser(__doc__)
options_parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="default: 2")
train(options_parser.parse_args())
dist.destroy_process_group()
