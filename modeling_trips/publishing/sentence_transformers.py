"""
Files for loading a retrieval checkpoint in Sentence Transformers, either as a `SentenceTransformer`, which compares
features, or as a `CrossEncoder`, which uses the matching head.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_trips import TripsForRetrieval, TripsPreTrainedModel, TripsProcessor


SENTENCE_TRANSFORMER, CROSS_ENCODER = "SentenceTransformer", "CrossEncoder"
KINDS = (SENTENCE_TRANSFORMER, CROSS_ENCODER)
MODULES = "sentence_transformers.base.modules"

# Method of the model and field of its output for each input.
FEATURES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}
MATCHING = {"message": {"method": "match", "method_output_name": "itm_logits", "format": "structured"}}

# A pair is two messages, a query and a document, one with the text and the other with the image.
PAIR_TEMPLATE = """
{%- for message in messages -%}
    {%- for part in message["content"] if part["type"] == "text" -%}
        {{- part["text"] -}}
    {%- endfor -%}
{%- endfor -%}
""".strip()

# Reduces the logits for no match and match to the logit of a sigmoid.
DIFFERENCE = torch.tensor([[-1.0, 1.0]])
DIFFERENCE_FOLDER = "1_Dense"


def check_kind(model: TripsPreTrainedModel, kind: str):
    """
    Raises:
        ValueError: `kind` is unknown, or the model does not support it.
    """
    if kind not in KINDS:
        raise ValueError(f"`sentence_transformers` must be one of {', '.join(KINDS)}, got {kind!r}.")
    if not isinstance(model, TripsForRetrieval):
        raise ValueError(f"A {kind} needs a TripsForRetrieval, got {type(model).__name__}.")
    weight = "itc_weight" if kind == SENTENCE_TRANSFORMER else "itm_weight"
    if getattr(model.config, weight) == 0:
        raise ValueError(f"A {kind} needs a model trained with {weight} above 0, got 0.")


def prepare(model: TripsPreTrainedModel, processor: TripsProcessor, kind: str):
    """Set the fields of the model and the processor that Sentence Transformers needs, before they are saved."""
    if kind == CROSS_ENCODER:
        model.config.num_labels = 1
        processor.chat_template = PAIR_TEMPLATE


def write_modules(target: Path, kind: str):
    """Write the files of Sentence Transformers into the folder `target` of a model and its processor."""
    is_encoder = kind == SENTENCE_TRANSFORMER
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{MODULES}.transformer.Transformer"}]
    if not is_encoder:
        modules.append({"idx": 1, "name": "1", "path": DIFFERENCE_FOLDER, "type": f"{MODULES}.dense.Dense"})
        _write_difference(target / DIFFERENCE_FOLDER)
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": FEATURES if is_encoder else MATCHING,
        "module_output_name": "sentence_embedding" if is_encoder else "scores",
    }
    options = (
        {"similarity_fn_name": "cosine"} if is_encoder else {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    )
    _write(target / "modules.json", modules)
    _write(target / "sentence_bert_config.json", transformer)
    _write(target / "config_sentence_transformers.json", {"model_type": kind, "prompts": {}, **options})


def _write_difference(folder: Path):
    folder.mkdir()
    save_file({"linear.weight": DIFFERENCE}, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"in_features": 2, "out_features": 1, "bias": False, "module_input_name": "scores"}
    _write(folder / "config.json", {**options, "activation_function": "torch.nn.modules.linear.Identity"})


def _write(path: Path, content: dict | list):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
