"""A tiny model for question answering, with four questions about two images and their answers."""

import torch

from modeling_trips import TripsConfig, TripsForQuestionAnswering


PAD, START, END = 0, 1, 2
QUESTIONS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0]])
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


def make_config(vocab_size=12, **selection):
    return TripsConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 16,
            "patch_size": 4,
            "initializer_range": 0.4,
            **{"selection_layers": [2, 3], "keep_rate": 0.5, **selection},
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.4,
        },
        fusion_encoder_config={"num_hidden_layers": 1},
        decoder_config={"num_hidden_layers": 2, "bos_token_id": START, "eos_token_id": END},
        initializer_range=0.4,
    )


def make_model(attn_implementation="sdpa", **fields):
    torch.manual_seed(0)
    config = make_config(**fields)
    return TripsForQuestionAnswering._from_config(config, attn_implementation=attn_implementation).eval()


def images(count=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def inputs():
    """Four questions about two images."""
    return {
        "input_ids": QUESTIONS,
        "attention_mask": MASK,
        "pixel_values": images(),
        "image_index": IMAGE_INDEX,
    }


def inputs_of(row):
    """Return the inputs of one question, without padding and index."""
    return {
        "input_ids": QUESTIONS[row : row + 1, : int(MASK[row].sum())],
        "pixel_values": images()[IMAGE_INDEX[row]][None],
    }


def log_probability(model, row, answer):
    """Compute the log-probability of an answer (a list of ids) to question `row`, token by token."""
    total, written = 0.0, [START]
    for token in answer:
        logits = model(**inputs_of(row), decoder_input_ids=torch.tensor([written])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
        written.append(token)
    return total


def tokens_of(answer):
    return [token for token in answer.tolist() if token not in (-100, PAD)]
