"""torchtitan's `Trainer` with SAP: the passes around its own train step, under FSDP2.

torchrun --nproc-per-node 2 examples/torchtitan_trainer.py --tiny --folder ./titan
"""

from dataclasses import dataclass

import torch.distributed as dist
from common import parser
from common_titan import Answers, options_of, random_pairs, settings
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer

from sap_fast import ProbeSet, SafetyPasses, contrastive_loss
from sap_fast.step.saving import SAPState


class SafeTrainer(Trainer):
    """A step of torchtitan with a safety pass and probe passes before it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """That of torchtitan; `build` makes this trainer of it."""

    def __init__(self, config):
        super().__init__(config)
        (model,) = self.model_parts  # more of them with pipeline parallelism, which is not for SAP
        probes = ProbeSet(model, list(model.layers.values())[:3])  # say which layers to probe
        self.answers = Answers(model)
        self.passes = SafetyPasses(model.parameters(), probes, safety_weight=0.1)
        self.optimizers.register_step_pre_hook(lambda *_: self.passes.blend_())
        self.optimizers.register_step_post_hook(lambda *_: self.passes.end_step())

    def train_step(self, data_iterator):
        """Run the passes on the micro-batches of the step, then torchtitan's step."""
        window = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        tokens = sum((labels != IGNORE_INDEX).sum() for _, labels in window).to(self.device)
        dist.all_reduce(tokens)
        seen, super_step = self.ntokens_seen, super().forward_backward_step

        def task(_):
            loss = 0.0
            for rows, labels in window:
                rows = {name: values.to(self.device) for name, values in rows.items()}
                given = {"labels": labels.to(self.device), "global_valid_tokens": tokens}
                loss += super_step(input_dict=rows, **given).detach()
            return loss

        def safety():
            with self.train_context():
                loss = contrastive_loss(self.answers, *random_pairs(self), pack=False)
                (loss / dist.get_world_size()).backward()  # torchtitan adds up over ranks
            return loss.detach()

        self.passes.inner_passes(task, safety)
        self.ntokens_seen = seen
        super().train_step(iter(window))
        if dist.get_rank() == 0:
            print(f"step {self.step}: safety loss {self.passes.metrics.safety_loss:.4f}")

    def forward_backward_step(self, **given):
        """Run torchtitan's forward and backward of one micro-batch, under the probe."""
        with self.passes.task_pass():
            return super().forward_backward_step(**given)

    def state_dict(self):
        """Return torchtitan's state and that of the passes."""
        return super().state_dict() | SAPState(self.passes).state_dict()

    def load_state_dict(self, state):
        """Load both."""
        super().load_state_dict(state)
        SAPState(self.passes).load_state_dict({"sap": state["sap"]})


trainer = SafeTrainer.Config(**settings(options_of(parser(__doc__)))).build()
trainer.train()
trainer.close()
dist.destroy_process_group()
