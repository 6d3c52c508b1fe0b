"""Lightning, by manual optimization: `training_step` runs the passes.

python examples/lightning_loop.py --tiny
python examples/lightning_loop.py --tiny --devices 2 --folder ./lightning
"""

from common import batch, encoded_rows, load_model, parser
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.data import TaskCollator


class SafeTuning(LightningModule):
    """A causal LM, fine-tuned with SAP."""

    def __init__(self, model):
        super().__init__()
        self.automatic_optimization = False
        self.model = model

    def configure_optimizers(self):
        """Build the optimizer; Lightning has wrapped the model for several devices by now."""
        optimizer = FusedSAP(self.model.parameters(), ProbeSet(self.model), lr=1e-5)
        optimizer.runs_in(self.trainer.strategy.model)
        return optimizer

    def training_step(self, rows, index):
        """Run one step of SAP."""
        optimizer = self.optimizers()

        def backward(loss):
            self.manual_backward(loss)
            return loss.detach()

        def task(part):
            return backward(task_loss(self.model, part))

        def safety():
            # By the number of safety passes so far: a resumed run goes on with the next pairs.
            seed = 1000 * optimizer.passes.direction.taken + 2 * self.global_rank
            pairs = batch(self.model, seed), batch(self.model, seed + 1)
            return backward(contrastive_loss(self.model, *pairs))

        optimizer.zero_grad()
        optimizer.inner_passes(task, safety, rows)
        with optimizer.task_pass() as record:
            record(task(rows))
        optimizer.step()
        self.print(f"step {self.global_step}: task loss {optimizer.metrics.task_loss:.4f}")


arguments = parser(__doc__)
arguments.add_argument("--devices", type=int, default=1, help="processes (default: 1)")
arguments.add_argument("--folder", default="lightning", help="folder for checkpoints")
arguments.add_argument("--resume", help="checkpoint to go on from")
options = arguments.parse_args()
seed_everything(0)
model = load_model(options)
rows = encoded_rows(model, 0, 4 * options.steps * options.devices)
trainer = Trainer(
    max_steps=options.steps,
    devices=options.devices,
    strategy="ddp" if options.devices > 1 else "auto",
    callbacks=[ModelCheckpoint(options.folder, every_n_train_steps=1, save_top_k=-1)],
    logger=False,
    enable_progress_bar=False,
)
loader = DataLoader(rows, batch_size=4, collate_fn=TaskCollator(pad_token_id=0))
trainer.fit(SafeTuning(model), loader, ckpt_path=options.resume)
