"""A tiny model for retrieval, with six captions of four images and helpers for its losses."""

import torch
from tiny_models import TEXTS

from modeling_trips import TripsConfig
from modeling_trips.modeling_trips_pretraining import TripsForRetrieval


# Six captions of four images; images 0 and 3 are the same.
MASK = (TEXTS != 0).long()
IMAGE_INDEX = torch.tensor([1, 0, 1, 2, 3, 0])
IMAGE_IDS = torch.tensor([7, 4, 5, 7])
PAIR_IDS = IMAGE_IDS[IMAGE_INDEX]


def make_config(vocab_size=20, decoder_layers=1, **fields):
    sizes = {"num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.4}
    return TripsConfig(
        vision_config={
            **sizes,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "image_size": 16,
            "patch_size": 4,
            "schedule": "2:text:0.5,3:text:0.5",
        },
        text_config={
            **sizes,
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "max_position_embeddings": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        fusion_encoder_config={"num_hidden_layers": 1},
        decoder_config={"num_hidden_layers": decoder_layers, "bos_token_id": 1, "eos_token_id": 2},
        initializer_range=0.4,
        **{"projection_dim": 8, **fields},
    )


def make_model(**fields):
    torch.manual_seed(0)
    return TripsForRetrieval(make_config(**fields)).eval()


def images(count=4, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def captions():
    """Return the six captions and their images."""
    return {"input_ids": TEXTS, "attention_mask": MASK, "pixel_values": images(), "image_index": IMAGE_INDEX}


def run(model, seed=0, **inputs):
    """Run the model with losses; the seed determines the negatives."""
    torch.manual_seed(seed)
    return model(**{**captions(), "image_ids": IMAGE_IDS, **inputs})


def matched_alone(model, text, image):
    """Run the whole model on one text without padding and one image."""
    states = model.model(TEXTS[text : text + 1, : int(MASK[text].sum())], images()[image : image + 1])
    return model.itm_head(states.last_hidden_state[0, 0])


def calls_of(module, run_model):
    """Return the number of rows of each call of `module` during `run_model`."""
    rows = []
    handle = module.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    run_model()
    handle.remove()
    return rows
