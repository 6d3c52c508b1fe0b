"""LoRA on a model in 4 bit, as it fits on one card of 24 GB: docs/how-to/qlora.md.

python examples/qlora.py --tiny
"""

import tempfile

import torch
from common import encoded_rows, load_model, parser, safety_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from sap_fast import SAPTrainer
from sap_fast.data import SafetyCollator, TaskCollator

options = parser(__doc__).parse_args()
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
with tempfile.TemporaryDirectory() as folder:
    if options.tiny:  # what is not on a hub has to be in a folder, to be quantized as it is loaded
        load_model(options).save_pretrained(f"{folder}/tiny")
        options.model = f"{folder}/tiny"
    base = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=torch.bfloat16
    )
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    trainer = SAPTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{folder}/run",
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=encoded_rows(model, 0, 32),
        data_collator=TaskCollator(pad_token_id=0),
        safety_dataset=safety_rows(model),
        safety_collator=SafetyCollator(pad_token_id=0),
        # The activations of one layer at a time, in every pass.
        probe={"checkpointing": "layers"},
    )
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")  # an adapter that names its base
