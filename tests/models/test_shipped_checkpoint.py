"""The bundled checkpoint gives the same numbers as when it was made."""

import torch
from PIL import Image
from places import EXAMPLES

from modeling_trips import TripsForQuestionAnswering, TripsProcessor


QUESTIONS = ["what color is the circle?", "what shape is the red shape?"]
KEPT = [  # by selection layer and question
    [
        [4, 5, 6, 12, 13, 14, 16, 20, 21, 22, 29, 30, 34, 37, 38, 51],
        [1, 3, 34, 35, 37, 38, 45, 46, *range(52, 56), *range(60, 64)],
    ]
]
FIRST_TOKENS = [[182, 146, 170], [148, 173, 166]]
LOGITS = [[9.679226, 2.360474, 2.190418], [9.532762, 1.839037, 0.597885]]


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
    assert processor.post_process_answers(model.generate(**inputs)) == ["yellow", "triangle"]
