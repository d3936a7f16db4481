"""The bundled checkpoint gives the same numbers as when it was made."""

import torch
from PIL import Image
from places import EXAMPLES

from modeling_trips import TripsForQuestionAnswering, TripsProcessor


QUESTIONS = ["what mark is on the red circle?", "what color is the cross?"]
KEPT = [[[127], [100]]]  # by selection layer and question
FIRST_TOKENS = [[138, 160, 123], [128, 170, 174]]
LOGITS = [[9.638316, 3.043677, 2.622042], [9.99985, 2.138674, 1.588511]]


@torch.no_grad()
def test_kept_patches_answers_and_logits_are_as_ever():
    folder = EXAMPLES / "trips-tiny-scenes"
    model, processor = TripsForQuestionAnswering.from_pretrained(folder), TripsProcessor.from_pretrained(folder)
    image = Image.open(EXAMPLES / "scene.png")
    inputs = processor(images=image, text=QUESTIONS, image_index=[0, 0], return_tensors="pt")
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    output = model(**inputs, decoder_input_ids=start)
    assert [layer.kept_indices.tolist() for layer in output.selection] == KEPT
    best = output.logits[:, 0].topk(3)
    assert best.indices.tolist() == FIRST_TOKENS
    torch.testing.assert_close(best.values, torch.tensor(LOGITS), rtol=0, atol=1e-4)
    assert processor.post_process_answers(model.generate(**inputs)) == ["dot", "purple"]
