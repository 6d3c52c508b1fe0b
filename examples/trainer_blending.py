"""transformers' Trainer with blending alone, which keeps most for least: no probe, one pass more.

python examples/trainer_blending.py --tiny
"""

import tempfile

from common import encoded_rows, load_model, parser, safety_rows
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from sap_fast import SAPTrainer
from sap_fast.data import SafetyCollator, TaskCollator

options = parser(__doc__).parse_args()
model = get_peft_model(
    load_model(options), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_alpha=16)
)
with tempfile.TemporaryDirectory() as folder:
    trainer = SAPTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=encoded_rows(model, 0, 32),
        data_collator=TaskCollator(pad_token_id=0),
        safety_dataset=safety_rows(model),
        safety_collator=SafetyCollator(pad_token_id=0),
        probe_layers=None,
        safety_loss="joint",
        # Down the safety loss by 0.3 of the gradient's length, where the model is less safe than it
        # came; sap/above_level in the log says which steps these were.
        sap_options={"safety_weight": 0.3, "safety_level": "auto"},
    )
    trainer.train()
