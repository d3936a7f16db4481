"""A tiny model for question answering, with four questions about two images and their answers."""

import tiny_retrieval
import torch
from tiny_models import TEXTS

from modeling_trips import TripsForQuestionAnswering


PAD, START, END = 0, 1, 2
VOCABULARY = 12
QUESTIONS = TEXTS[:4]
MASK = (QUESTIONS != PAD).long()
IMAGE_INDEX = torch.tensor([1, 0, 1, 0])
# Six answers; the first two, and the next two, begin with the same token.
ANSWERS = torch.tensor(
    [[5, 6, END], [5, 7, END], [8, END, -100], [8, 3, END], [4, END, -100], [6, 6, END]],
)
# Seven answers to four questions, with weights.
LABELS = ANSWERS[[0, 3, 5, 2, 1, 4, 0]]
QUESTION_INDEX = torch.tensor([0, 0, 1, 2, 2, 2, 3])
WEIGHTS = torch.tensor([0.7, 0.3, 1.0, 0.1, 0.6, 0.3, 1.0])


def make_config():
    return tiny_retrieval.make_config(vocab_size=VOCABULARY, decoder_layers=2)


def make_model():
    torch.manual_seed(0)
    return TripsForQuestionAnswering(make_config()).eval()


def inputs():
    """Four questions about two images."""
    return {
        "input_ids": QUESTIONS,
        "attention_mask": MASK,
        "pixel_values": tiny_retrieval.images(2),
        "image_index": IMAGE_INDEX,
    }


def inputs_of(row):
    """Return the inputs of one question, without padding and index."""
    return {
        "input_ids": QUESTIONS[row : row + 1, : int(MASK[row].sum())],
        "pixel_values": tiny_retrieval.images(2)[IMAGE_INDEX[row]][None],
    }


def log_probability(model, row, answer):
    """Compute the log-probability of an answer (a list of ids) to question `row`, token by token."""
    total = 0.0
    written = [START]
    for token in answer:
        logits = model(**inputs_of(row), decoder_input_ids=torch.tensor([written])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
        written.append(token)
    return total


def tokens_of(answer):
    return [token for token in answer.tolist() if token not in (-100, PAD)]
