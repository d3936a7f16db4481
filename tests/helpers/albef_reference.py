"""
ALBEF from its public description, of timm's ViT and Transformers' BERT, and random checkpoints under its names.

The layers 6 to 11 of its BERT attend to the image between self-attention and feed-forward, and a decoder of six such
layers reads the question's states. It shares nothing with the package.
"""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertLMHeadModel


FUSION = 6  # the first layer that attends to the image


class Sizes(NamedTuple):
    width: int = 16
    num_heads: int = 2
    intermediate: int = 40
    patch_size: int = 4
    grid: int = 3
    vocab: int = 60
    max_length: int = 12
    projection: int = 8


TINY = Sizes()


def make_bert(sizes, num_layers):
    config = BertConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=num_layers,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=sizes.max_length,
        is_decoder=True,
        add_cross_attention=True,
    )
    return BertLMHeadModel(config)


class Albef(nn.Module):
    """ALBEF with the state dict `weights` of a checkpoint."""

    def __init__(self, weights, sizes=TINY):
        super().__init__()
        self.visual_encoder = VisionTransformer(
            img_size=sizes.grid * sizes.patch_size,
            patch_size=sizes.patch_size,
            embed_dim=sizes.width,
            depth=12,
            num_heads=sizes.num_heads,
            mlp_ratio=sizes.intermediate / sizes.width,
            num_classes=0,
        )
        self.text_encoder = make_bert(sizes, num_layers=12)
        self.text_decoder = make_bert(sizes, num_layers=6)
        self.vision_proj = nn.Linear(sizes.width, sizes.projection)
        self.text_proj = nn.Linear(sizes.width, sizes.projection)
        self.itm_head = nn.Linear(sizes.width, 2)
        for bert in (self.text_encoder, self.text_decoder):  # an output layer may be of its own
            decoder = bert.cls.predictions.decoder
            decoder.weight = nn.Parameter(decoder.weight.detach().clone())
        named = {}
        for key, weight in weights.items():
            is_without_head = key.startswith("text_encoder.") and key.split(".")[1] not in ("bert", "cls")
            named[key.replace(".", ".bert.", 1) if is_without_head else key] = weight
        self.load_state_dict(named, strict=False)
        self.eval()

    def run_layers(self, layers, states, attention_mask, image_states=None):
        mask = (1.0 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min
        for layer in layers:
            states = layer(states, mask, encoder_hidden_states=image_states)
        return states

    def image_states(self, pixel_values):
        return self.visual_encoder.forward_features(pixel_values)

    def text_states(self, input_ids, attention_mask):
        bert = self.text_encoder.bert
        return self.run_layers(bert.encoder.layer[:FUSION], bert.embeddings(input_ids), attention_mask)

    def fused_states(self, input_ids, attention_mask, pixel_values):
        layers = self.text_encoder.bert.encoder.layer[FUSION:]
        text_states = self.text_states(input_ids, attention_mask)
        return self.run_layers(layers, text_states, attention_mask, self.image_states(pixel_values))

    def image_features(self, pixel_values):
        return normalize(self.vision_proj(self.image_states(pixel_values)[:, 0]), dim=-1)

    def text_features(self, input_ids, attention_mask):
        return normalize(self.text_proj(self.text_states(input_ids, attention_mask)[:, 0]), dim=-1)

    def matching_logits(self, **inputs):
        return self.itm_head(self.fused_states(**inputs)[:, 0])

    def masked_language_logits(self, **inputs):
        return self.text_encoder.cls(self.fused_states(**inputs))

    def decoder_logits(self, input_ids, attention_mask, pixel_values, answer_ids):
        states = self.fused_states(input_ids, attention_mask, pixel_values)
        return self.text_decoder(
            answer_ids, encoder_hidden_states=states, encoder_attention_mask=attention_mask, use_cache=False
        ).logits

    def rank_answers(self, input_ids, attention_mask, pixel_values, answer_ids, k):
        """
        Compute ALBEF's `rank_answer` (models/model_vqa.py): answers and their probabilities among the k, best first.

        `answer_ids` begin with the start token and are padded with 0. The k answers with the likeliest first token are
        scored; the log-probability of this token counts twice.
        """
        start_ids = answer_ids[:1, :1].expand(len(input_ids), 1)
        first = self.decoder_logits(input_ids, attention_mask, pixel_values, start_ids)[:, 0].log_softmax(-1)
        first, candidates = first[:, answer_ids[:, 1]].topk(k)
        scores = []
        for row, ids in enumerate(answer_ids[candidates]):
            rows = [row] * k
            logits = self.decoder_logits(input_ids[rows], attention_mask[rows], pixel_values[rows], ids)
            labels = ids[:, 1:]
            log_probs = logits[:, :-1].log_softmax(-1).gather(2, labels[..., None])[..., 0]
            scores.append(first[row] + (log_probs * (labels != 0)).sum(1))
        probabilities, order = torch.stack(scores).softmax(-1).topk(k)
        return candidates.gather(1, order), probabilities


def random_checkpoint(task, sizes=TINY):
    """
    Return a "pretraining", "retrieval" (or RefCOCO) or "question-answering" checkpoint with random values, at a scale
    where attention is not flat. Tied weights are equal.
    """
    weights = {}
    for key, weight in Albef({}, sizes).state_dict().items():
        scale = 1.5 / weight.shape[-1] ** 0.5 if weight.dim() == 2 and "embeddings" not in key else 0.3
        weights[key] = scale * torch.randn(weight.shape) + ("norm" in key.lower() and key.endswith(".weight"))
    for name in ("text_encoder", "text_decoder"):
        weights[f"{name}.bert.embeddings.position_ids"] = torch.arange(sizes.max_length)[None]
        weights[f"{name}.cls.predictions.decoder.weight"] = weights[f"{name}.bert.embeddings.word_embeddings.weight"]
        weights[f"{name}.cls.predictions.decoder.bias"] = weights[f"{name}.cls.predictions.bias"]
    left_out = [f"text_encoder.bert.encoder.layer.{number}.crossattention." for number in range(FUSION)]
    left_out += ["vision_proj.", "text_proj.", "itm_head."] if task == "question-answering" else ["text_decoder."]
    if task != "pretraining":
        left_out.append("text_encoder.cls.")
    weights = {key: weight for key, weight in weights.items() if not key.startswith(tuple(left_out))}
    if task != "pretraining":
        weights = {key.replace("text_encoder.bert.", "text_encoder."): weight for key, weight in weights.items()}
    # The momentum copy, and the queues.
    is_copied = {key: not key.startswith("itm_head.") for key in weights}
    weights |= {key.replace(".", "_m.", 1): weight.clone() for key, weight in weights.items() if is_copied[key]}
    if task == "question-answering":
        return weights
    queue = torch.zeros(sizes.projection, 4)
    weights |= {"image_queue": queue, "text_queue": queue.clone(), "queue_ptr": torch.zeros(1)}
    if task == "retrieval":
        weights["idx_queue"] = torch.zeros(1, 4)
    return weights | {"temp": torch.tensor(0.2)}
