"""What scoring leaves behind in a model."""

from sap_fast.data import Request, TaskCollator, encode_chat
from sap_fast.evaluation import evaluate_model
from sap_fast.losses import task_loss
from tests.evaluation.conftest import build_model, chat


def test_a_model_can_be_trained_after_it_was_scored(tokenizer):
    # Dynamic rotary frequencies are computed anew, and kept, when a sequence is longer than any
    # before: under inference_mode they could not take part in a backward pass.
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build_model(tokenizer, max_position_embeddings=16, rope_parameters=rope)
    rows = [encode_chat(tokenizer, chat("Sing", "La"))]
    evaluate_model(model, tokenizer, task_rows=rows, harmful=[Request("Sing")])
    assert not any(buffer.is_inference() for buffer in model.buffers())
    task_loss(model, TaskCollator(0)(rows)).backward()
