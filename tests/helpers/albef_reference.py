"""
Independent implementation of ALBEF from its public description, and random checkpoints for it.

timm's ViT (pre-norm, LayerNorm eps 1e-6, q, k and v stacked); BERT (post-norm, eps 1e-12) whose layers 6 to 11 attend
to the image between self-attention and feed-forward; a decoder of six such layers that reads the question's states.
It shares nothing with the package.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear, normalize


class Sizes(NamedTuple):
    width: int = 16
    num_heads: int = 2
    intermediate: int = 40
    patch_size: int = 4
    grid: int = 3
    vocab: int = 60
    max_length: int = 12
    projection: int = 8
    num_vision_layers: int = 12
    num_text_layers: int = 12
    first_fusion_layer: int = 6
    num_decoder_layers: int = 6


TINY = Sizes()


def affine(name: str, num_out: int, num_in: int) -> dict[str, tuple]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def norm(name: str, width: int) -> dict[str, tuple]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vit_shapes(sizes: Sizes) -> dict[str, tuple]:
    width = sizes.width
    name = "visual_encoder"
    shapes = {
        f"{name}.cls_token": (1, 1, width),
        f"{name}.pos_embed": (1, 1 + sizes.grid**2, width),
        f"{name}.patch_embed.proj.weight": (width, 3, sizes.patch_size, sizes.patch_size),
        f"{name}.patch_embed.proj.bias": (width,),
    }
    for i in range(sizes.num_vision_layers):
        block = f"{name}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", width)
        shapes |= affine(f"{block}.attn.qkv", 3 * width, width)
        shapes |= affine(f"{block}.attn.proj", width, width)
        shapes |= norm(f"{block}.norm2", width)
        shapes |= affine(f"{block}.mlp.fc1", sizes.intermediate, width)
        shapes |= affine(f"{block}.mlp.fc2", width, sizes.intermediate)
    return shapes | norm(f"{name}.norm", width)


def attention_shapes(name: str, width: int) -> dict[str, tuple]:
    shapes = {}
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= affine(f"{name}.{part}", width, width)
    return shapes | norm(f"{name}.output.LayerNorm", width)


def bert_shapes(sizes: Sizes, name: str, num_layers: int, first_fusion_layer: int) -> dict[str, tuple]:
    width = sizes.width
    shapes = {
        f"{name}.embeddings.position_ids": (1, sizes.max_length),
        f"{name}.embeddings.word_embeddings.weight": (sizes.vocab, width),
        f"{name}.embeddings.position_embeddings.weight": (sizes.max_length, width),
        f"{name}.embeddings.token_type_embeddings.weight": (2, width),
    }
    shapes |= norm(f"{name}.embeddings.LayerNorm", width)
    for i in range(num_layers):
        layer = f"{name}.encoder.layer.{i}"
        shapes |= attention_shapes(f"{layer}.attention", width)
        if i >= first_fusion_layer:
            shapes |= attention_shapes(f"{layer}.crossattention", width)
        shapes |= affine(f"{layer}.intermediate.dense", sizes.intermediate, width)
        shapes |= affine(f"{layer}.output.dense", width, sizes.intermediate)
        shapes |= norm(f"{layer}.output.LayerNorm", width)
    return shapes


def prediction_shapes(sizes: Sizes, name: str) -> dict[str, tuple]:
    return {
        f"{name}.cls.predictions.bias": (sizes.vocab,),
        **affine(f"{name}.cls.predictions.transform.dense", sizes.width, sizes.width),
        **norm(f"{name}.cls.predictions.transform.LayerNorm", sizes.width),
        **affine(f"{name}.cls.predictions.decoder", sizes.vocab, sizes.width),
    }


def checkpoint_shapes(task: str, sizes: Sizes) -> dict[str, tuple]:
    """Return the shapes of a "pretraining", "retrieval" (or RefCOCO) or "question-answering" checkpoint, by key."""
    text = "text_encoder.bert" if task == "pretraining" else "text_encoder"
    shapes = vit_shapes(sizes) | bert_shapes(sizes, text, sizes.num_text_layers, sizes.first_fusion_layer)
    if task == "question-answering":
        shapes |= bert_shapes(sizes, "text_decoder.bert", sizes.num_decoder_layers, 0)
        shapes |= prediction_shapes(sizes, "text_decoder")
    else:
        shapes |= affine("vision_proj", sizes.projection, sizes.width)
        shapes |= affine("text_proj", sizes.projection, sizes.width)
    if task == "pretraining":
        shapes |= prediction_shapes(sizes, "text_encoder")
    shapes |= {key.replace(".", "_m.", 1): shape for key, shape in shapes.items()}  # momentum
    if task == "question-answering":
        return shapes
    shapes |= {"image_queue": (sizes.projection, 4), "text_queue": (sizes.projection, 4), "queue_ptr": (1,)}
    if task == "retrieval":
        shapes["idx_queue"] = (1, 4)
    shapes |= affine("itm_head", 2, sizes.width)
    return shapes | {"temp": ()}


def random_checkpoint(task: str, sizes: Sizes = TINY) -> dict[str, torch.Tensor]:
    """Return a state dict with random values, at a scale where attention is not flat. Tied weights are equal."""
    weights = {}
    for key, shape in checkpoint_shapes(task, sizes).items():
        scale = 1.5 / shape[-1] ** 0.5 if len(shape) == 2 and "embeddings" not in key else 0.3
        weights[key] = scale * torch.randn(shape)
        if "norm" in key.lower() and key.endswith(".weight"):
            weights[key] += 1
        if key.endswith("position_ids"):
            weights[key] = torch.arange(sizes.max_length)[None]
    for name in ("text_encoder", "text_decoder", "text_encoder_m", "text_decoder_m"):
        if f"{name}.cls.predictions.bias" in weights:
            embeddings = weights[f"{name}.bert.embeddings.word_embeddings.weight"]
            weights[f"{name}.cls.predictions.decoder.weight"] = embeddings
            weights[f"{name}.cls.predictions.decoder.bias"] = weights[f"{name}.cls.predictions.bias"]
    if "temp" in weights:
        weights["temp"] = torch.tensor(0.2)
    return weights


class Albef:
    """ALBEF with the state dict `weights` of a checkpoint."""

    def __init__(self, weights: dict[str, torch.Tensor], sizes: Sizes = TINY):
        self.weights = weights
        self.sizes = sizes
        self.text = "text_encoder.bert" if "text_encoder.bert.embeddings.LayerNorm.bias" in weights else "text_encoder"

    def linear(self, name, states):
        return linear(states, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, states, eps):
        return layer_norm(states, states.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def attend(self, query, key, value, allowed=None):
        """softmax(q k^T / sqrt(d)) v per head, then the heads side by side. `allowed` broadcasts to (b, h, q, k)."""

        def heads(states):
            return states.unflatten(-1, (self.sizes.num_heads, -1)).transpose(1, 2)

        scores = heads(query) @ heads(key).transpose(-1, -2)
        scores = scores / (self.sizes.width / self.sizes.num_heads) ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        attended = scores.softmax(-1) @ heads(value)
        return attended.transpose(1, 2).flatten(2)

    def image_states(self, pixel_values):
        name = "visual_encoder"
        kernel = self.weights[f"{name}.patch_embed.proj.weight"]
        bias = self.weights[f"{name}.patch_embed.proj.bias"]
        patches = conv2d(pixel_values, kernel, bias, stride=self.sizes.patch_size).flatten(2).transpose(1, 2)
        class_token = self.weights[f"{name}.cls_token"].expand(len(patches), -1, -1)
        states = torch.cat([class_token, patches], dim=1) + self.weights[f"{name}.pos_embed"]
        for i in range(self.sizes.num_vision_layers):
            block = f"{name}.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", states, 1e-6))
            states = states + self.linear(f"{block}.attn.proj", self.attend(*qkv.chunk(3, dim=-1)))
            hidden = gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", states, 1e-6)))
            states = states + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{name}.norm", states, 1e-6)

    def embed(self, name, input_ids):
        name = f"{name}.embeddings"
        states = self.weights[f"{name}.word_embeddings.weight"][input_ids]
        states = states + self.weights[f"{name}.position_embeddings.weight"][: input_ids.shape[1]]
        states = states + self.weights[f"{name}.token_type_embeddings.weight"][0]
        return self.norm(f"{name}.LayerNorm", states, 1e-12)

    def bert_attention(self, name, states, source, allowed):
        query = self.linear(f"{name}.self.query", states)
        key = self.linear(f"{name}.self.key", source)
        value = self.linear(f"{name}.self.value", source)
        attended = self.linear(f"{name}.output.dense", self.attend(query, key, value, allowed))
        return self.norm(f"{name}.output.LayerNorm", attended + states, 1e-12)

    def bert_layers(self, name, numbers, states, allowed, source=None, source_allowed=None):
        for i in numbers:
            layer = f"{name}.encoder.layer.{i}"
            states = self.bert_attention(f"{layer}.attention", states, states, allowed)
            if source is not None:
                states = self.bert_attention(f"{layer}.crossattention", states, source, source_allowed)
            hidden = self.linear(f"{layer}.output.dense", gelu(self.linear(f"{layer}.intermediate.dense", states)))
            states = self.norm(f"{layer}.output.LayerNorm", hidden + states, 1e-12)
        return states

    def text_states(self, input_ids, attention_mask):
        states = self.embed(self.text, input_ids)
        allowed = attention_mask[:, None, None].bool()
        return self.bert_layers(self.text, range(self.sizes.first_fusion_layer), states, allowed)

    def fused_states(self, input_ids, attention_mask, pixel_values):
        numbers = range(self.sizes.first_fusion_layer, self.sizes.num_text_layers)
        states = self.text_states(input_ids, attention_mask)
        allowed = attention_mask[:, None, None].bool()
        return self.bert_layers(self.text, numbers, states, allowed, source=self.image_states(pixel_values))

    def image_features(self, pixel_values):
        return normalize(self.linear("vision_proj", self.image_states(pixel_values)[:, 0]), dim=-1)

    def text_features(self, input_ids, attention_mask):
        return normalize(self.linear("text_proj", self.text_states(input_ids, attention_mask)[:, 0]), dim=-1)

    def matching_logits(self, input_ids, attention_mask, pixel_values):
        return self.linear("itm_head", self.fused_states(input_ids, attention_mask, pixel_values)[:, 0])

    def predict(self, name, states):
        name = f"{name}.cls.predictions"
        states = gelu(self.linear(f"{name}.transform.dense", states))
        return self.linear(f"{name}.decoder", self.norm(f"{name}.transform.LayerNorm", states, 1e-12))

    def masked_language_logits(self, input_ids, attention_mask, pixel_values):
        return self.predict("text_encoder", self.fused_states(input_ids, attention_mask, pixel_values))

    def decoder_logits(self, input_ids, attention_mask, pixel_values, answer_ids):
        fused_states = self.fused_states(input_ids, attention_mask, pixel_values)
        length = answer_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        states = self.bert_layers(
            "text_decoder.bert",
            range(self.sizes.num_decoder_layers),
            self.embed("text_decoder.bert", answer_ids),
            causal,
            fused_states,
            attention_mask[:, None, None].bool(),
        )
        return self.predict("text_decoder", states)

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
