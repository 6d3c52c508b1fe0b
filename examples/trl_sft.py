"""TRL's SFTTrainer with SAP: the mixin goes in front, and TRL's own loss runs in every pass.

python examples/trl_sft.py --tiny
python examples/trl_sft.py --tiny --blend
"""

import tempfile

from common import encoded_rows, load_model, parser, safety_rows
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sap_fast import SAPTrainerMixin
from sap_fast.data import SafetyCollator


class SAPSFTTrainer(SAPTrainerMixin, SFTTrainer):
    """All that it takes."""


arguments = parser(__doc__)
arguments.add_argument("--blend", action="store_true", help="blend, without a probe")
options = arguments.parse_args()
model = load_model(options)
if options.tiny:
    words = {f"w{number}": number for number in range(254)} | {"<pad>": 254, "<eos>": 255}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
else:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
with tempfile.TemporaryDirectory() as folder:
    trainer = SAPSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
        train_dataset=Dataset.from_list(encoded_rows(model, 0, 32)),
        processing_class=tokenizer,
        safety_dataset=safety_rows(model),
        safety_collator=SafetyCollator(pad_token_id=0),
        method="blend" if options.blend else "sap",
    )
    trainer.train()
