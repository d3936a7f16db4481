"""
Reference implementation of layers with patch selection and of TRIPS' vision tower from the definition, with loops
over images, heads and tokens.

    q     = W_q t                                        # the guiding text; without one the query of [CLS]
    a     = mean over heads of softmax_i(q . K_i / sqrt(d_head))     # over the candidates, [CLS] left out
    keep  = the ceil(r n) candidates with the largest a, in order; of equal ones the first
    f     = sum over the others of a_i X'_i              # one candidate more for the next selection layer

It shares nothing with the package but the names of the weights and the configuration.
"""

import math
from fractions import Fraction
from functools import partial

import torch
from schedules import guidances_of, rates_of
from torch import nn


def bicubic_weights(position):
    """Return the four taps (offset from the floor, weight) of cubic convolution with a = -0.75."""
    a, floor = -0.75, math.floor(position)
    taps = []
    for offset in (-1, 0, 1, 2):
        x = abs(position - (floor + offset))
        if x <= 1:
            weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
        else:
            weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        taps.append((floor + offset, weight))
    return taps


def positions_for(table, old_grid, grid):
    """Resample position embeddings `table` (1 + rows * columns, width) from `old_grid` to `grid`, without [CLS]."""
    old_rows, old_columns = old_grid
    rows, columns = grid
    positions = [table[0]]
    for row in range(rows):
        for column in range(columns):
            total = 0
            for y, weight_y in bicubic_weights((row + 0.5) * old_rows / rows - 0.5):
                for x, weight_x in bicubic_weights((column + 0.5) * old_columns / columns - 0.5):
                    y_inside = min(max(y, 0), old_rows - 1)
                    x_inside = min(max(x, 0), old_columns - 1)
                    total = total + weight_y * weight_x * table[1 + y_inside * old_columns + x_inside]
            positions.append(total)
    return positions


def naive_layers(tokens, layers, num_heads, num_prefix, guides, keep_rates, fuses=True):
    """
    Run one image through pre-norm layers with selection, token by token, with the whole attention map.

    Args:
        tokens: tensor (n, width). The first `num_prefix` are always kept.
        layers: per layer a dict with norm1, norm2 (callables), q, k, v, o ((weight, bias) pairs), mlp (callable) and
            optionally q_norm, k_norm, scale1, scale2 (callables).
        guides: by number of the selection layer the position of the guiding token, None for the mean of all queries,
            or a vector.
        keep_rates: by number of the selection layer.

    Returns:
        The tokens after the last layer, and per selection layer the numbers of the kept patches, the scores, and the
        numbers of the candidates, -1 if fused.
    """
    numbers = list(range(len(tokens) - num_prefix))
    selections = []
    for number, layer in enumerate(layers, start=1):
        normed = [layer["norm1"](token) for token in tokens]
        queries = [split_into_heads(layer, "q", state, num_heads) for state in normed]
        keys = [split_into_heads(layer, "k", state, num_heads) for state in normed]
        values = [split_into_heads(layer, "v", state, num_heads) for state in normed]
        weight, bias = layer["o"]
        updated = []
        for token, query in zip(tokens, queries):
            attended = []
            for head in range(num_heads):
                shares = attention_of_head(query, keys, head)
                attended.append(sum(share * value[head] for share, value in zip(shares, values)))
            output = weight @ torch.cat(attended) + bias
            updated.append(token + layer.get("scale1", nn.Identity())(output))
        tokens = torch.stack(updated)
        if number in keep_rates:
            guide = guides[number]
            if isinstance(guide, torch.Tensor):
                query = split_into_heads(layer, "q", guide, num_heads)
            elif guide is None:
                query = [sum(query[head] for query in queries) / len(queries) for head in range(num_heads)]
            else:
                query = queries[guide]
            scores = sum(attention_of_head(query, keys[num_prefix:], head) for head in range(num_heads)) / num_heads
            num_kept = math.ceil(Fraction(str(keep_rates[number])) * len(scores))
            ranked = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
            kept = sorted(ranked[:num_kept])
            rest = ranked[num_kept:]
            prefix, candidates = tokens.split((num_prefix, len(scores)))
            tokens = torch.cat([prefix, candidates[kept]])
            selections.append(([numbers[i] for i in kept], scores, numbers))
            numbers = [numbers[i] for i in kept]
            if fuses and rest:
                fused = sum(scores[i] * candidates[i] for i in rest)
                tokens = torch.cat([tokens, fused[None]])
                numbers = [*numbers, -1]
        updated = []
        for token in tokens:
            output = layer["mlp"](layer["norm2"](token))
            updated.append(token + layer.get("scale2", nn.Identity())(output))
        tokens = torch.stack(updated)
    return tokens, selections


def split_into_heads(layer, name, state, num_heads):
    weight, bias = layer[name]
    norm = layer.get(f"{name}_norm", nn.Identity())
    return [norm(vector) for vector in (weight @ state + bias).chunk(num_heads)]


def attention_of_head(query, keys, head):
    logits = [query[head] @ key[head] / math.sqrt(len(query[head])) for key in keys]
    return torch.stack(logits).softmax(dim=0)


def pair(size):
    return size if isinstance(size, list) else [size, size]


class NaiveVisionTower:
    """
    Args:
        weights: state dict of a `TripsVisionModel` with a linear patch embedding, in float64.
        config: the model's configuration.
    """

    def __init__(self, weights, config):
        self.weights = weights
        self.config = config
        self.keep_rates = rates_of(config)
        self.guidances = guidances_of(config)

    def linear(self, name, x):
        y = self.weights[f"{name}.weight"] @ x
        if f"{name}.bias" in self.weights:
            y = y + self.weights[f"{name}.bias"]
        return y

    def layernorm(self, name, x):
        centered = x - x.sum() / len(x)
        normed = centered / ((centered**2).sum() / len(x) + self.config.layer_norm_eps) ** 0.5
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def activation(self, x):
        if self.config.hidden_act == "quick_gelu":
            return x / (1 + torch.exp(-1.702 * x))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def embed(self, image):
        height, width = pair(self.config.patch_size)
        image_height, image_width = pair(self.config.image_size)
        rows = image.shape[1] // height
        columns = image.shape[2] // width
        kernel = self.weights["embeddings.patch_embeddings.projection.weight"]
        bias = self.weights.get("embeddings.patch_embeddings.projection.bias", 0)
        tokens = [self.weights["embeddings.cls_token"][0, 0]]
        for row in range(rows):
            for column in range(columns):
                patch = image[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
                tokens.append(torch.stack([(filter_ * patch).sum() for filter_ in kernel]) + bias)
        table = self.weights["embeddings.position_embeddings"][0]
        old_grid = (image_height // height, image_width // width)
        positions = positions_for(table, old_grid, (rows, columns))
        tokens = [token + position for token, position in zip(tokens, positions)]
        if "pre_layernorm.weight" in self.weights:
            tokens = [self.layernorm("pre_layernorm", token) for token in tokens]
        return tokens

    def mlp(self, name, token):
        return self.linear(f"{name}.fc2", self.activation(self.linear(f"{name}.fc1", token)))

    def layer(self, name):
        """Return the parts of a layer, as `naive_layers` takes them."""
        pairs = {}
        for part in "qkvo":
            projection = f"{name}.attention.{part}_proj"
            pairs[part] = self.weights[f"{projection}.weight"], self.weights[f"{projection}.bias"]
        return {
            **pairs,
            "norm1": partial(self.layernorm, f"{name}.layernorm_before"),
            "norm2": partial(self.layernorm, f"{name}.layernorm_after"),
            "mlp": partial(self.mlp, f"{name}.mlp"),
        }

    def run_image(self, image, text, joined=()):
        """
        Return last hidden states (num_tokens, width), and kept indices, scores and candidates by layer. In a single
        stream, `joined` are the states of the text, which come first.
        """
        tokens = self.embed(image)
        if joined:
            of_text, of_image = self.weights["modality_embeddings.weight"]
            tokens = [state + of_text for state in joined] + [token + of_image for token in tokens]
        guides = dict.fromkeys(self.keep_rates, len(joined))  # [CLS] of the image
        for number, guidance in self.guidances.items():
            if guidance == "text" and joined:
                guides[number] = 0
            elif guidance == "text" and text is not None:
                guides[number] = text
        tokens, selections = naive_layers(
            torch.stack(tokens),
            [self.layer(f"layers.{number}") for number in range(self.config.num_hidden_layers)],
            num_heads=self.config.num_attention_heads,
            num_prefix=len(joined) + 1,
            guides=guides,
            keep_rates=self.keep_rates,
            fuses=self.config.fuse_inattentive_tokens,
        )
        return torch.stack([self.layernorm("layernorm", token) for token in tokens]), selections

    def __call__(self, images, texts=None):
        """Return one entry per text: `(last_hidden_state, [(kept_indices, scores, candidate_indices), ...])`."""
        if texts is None:
            return [self.run_image(image, None) for image in images]
        if "selection_projection.weight" in self.weights:
            texts = [self.linear("selection_projection", text) for text in texts]
        return [self.run_image(image, text) for image, text in zip(images, texts, strict=True)]
