"""The bundled checkpoint gives the same numbers as when it was made."""

import torch
from PIL import Image, ImageDraw
from places import EXAMPLES

from modeling_trips import TripsForQuestionAnswering, TripsProcessor


QUESTIONS = ["what color is the shape?", "is there a circle?"]
CENTER = [18, 19, 20, 21, 26, 27, 28, 29, 34, 35, 36, 37, 42, 43, 44, 45]
KEPT = [  # by selection layer and question
    [
        [*range(8), 18, 19, 20, 21, *range(26, 31), *range(34, 39), *range(42, 47), *range(50, 55)],
        [*range(8), *range(18, 23), *range(26, 31), *range(34, 39), *range(42, 47), *range(50, 54)],
    ],
    [[*CENTER, -1], [*CENTER, -1]],
]
FIRST_TOKENS = [[146, 136, 150], [150, 136, 171]]
LOGITS = [[9.942533, 1.715019, 1.065390], [7.866401, 3.769530, 0.478318]]


@torch.no_grad()
def test_kept_patches_answers_and_logits_are_as_ever():
    folder = EXAMPLES / "trips-tiny-scenes"
    model, processor = TripsForQuestionAnswering.from_pretrained(folder), TripsProcessor.from_pretrained(folder)
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), fill="teal")
    inputs = processor(images=image, text=QUESTIONS, image_index=[0, 0], return_tensors="pt")
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    output = model(**inputs, decoder_input_ids=start)
    assert [layer.kept_indices.tolist() for layer in output.selection] == KEPT
    best = output.logits[:, 0].topk(3)
    assert best.indices.tolist() == FIRST_TOKENS
    torch.testing.assert_close(best.values, torch.tensor(LOGITS), rtol=0, atol=1e-4)
    assert processor.post_process_answers(model.generate(**inputs)) == ["teal", "yes"]
