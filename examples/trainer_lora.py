"""transformers' Trainer with LoRA from PEFT, and SAP or blending.

python examples/trainer_lora.py --tiny
python examples/trainer_lora.py --tiny --blend
"""

import tempfile

from common import encoded_rows, load_model, parser, safety_rows
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from sap_fast import SAPTrainer
from sap_fast.data import SafetyCollator, TaskCollator

arguments = parser(__doc__)
arguments.add_argument("--blend", action="store_true", help="blend, without a probe")
options = arguments.parse_args()
if options.blend:
    # Down the safety loss by 0.3 of the gradient's length, where the model is less safe than it
    # came; sap/above_level in the log says which steps these were.
    how = {"method": "blend", "sap_options": {"safety_weight": 0.3}}
else:
    # The probe from half of the rows, and a safety pass in every fifth step: a step of less time.
    how = {"method": "sap", "probe": {"rows": 0.5}, "sap_options": {"direction_every": 5}}
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
            gradient_accumulation_steps=2,
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
        **how,
    )
    trainer.train()
