"""
Reference implementation of TRIPS' vision tower from the definition, with loops over images, heads and tokens.

    q     = W_q t                                        # the guiding text; without one the query of [CLS]
    a     = mean over heads of softmax_i(q . K_i / sqrt(d_head))     # over the candidates, [CLS] left out
    keep  = the ceil(r n) candidates with the largest a, in order; of equal ones the first
    f     = sum over the others of a_i X'_i              # one candidate more for the next selection layer

It shares nothing with the package but the names of the weights and the configuration.
"""

import math
from fractions import Fraction

import torch
from schedules import guidances_of, rates_of


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


def pair(size: int | list[int]) -> list[int]:
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

    def heads(self, vector):
        return vector.split(len(vector) // self.config.num_attention_heads)

    def softmax_over(self, query, keys):
        logits = [(query * key).sum() / math.sqrt(len(query)) for key in keys]
        largest = max(logit.item() for logit in logits)
        powers = [torch.exp(logit - largest) for logit in logits]
        return [power / sum(powers) for power in powers]

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

    def attend(self, name, tokens):
        """Return the tokens after the attention of a layer, and their queries and keys by token and head."""
        normed = [self.layernorm(f"{name}.layernorm_before", token) for token in tokens]
        query = [self.heads(self.linear(f"{name}.attention.q_proj", token)) for token in normed]
        key = [self.heads(self.linear(f"{name}.attention.k_proj", token)) for token in normed]
        value = [self.heads(self.linear(f"{name}.attention.v_proj", token)) for token in normed]
        attended = []
        for token, query_of_token in zip(tokens, query):
            mixed = []
            for head, query_of_head in enumerate(query_of_token):
                weights = self.softmax_over(query_of_head, [one[head] for one in key])
                mixed.append(sum(weight * one[head] for weight, one in zip(weights, value)))
            attended.append(token + self.linear(f"{name}.attention.o_proj", torch.cat(mixed)))
        return attended, query, key

    def scores_of(self, guide, key):
        """Return the attention of one token, of which `guide` has the queries by head, averaged over the heads."""
        by_head = [self.softmax_over(query, [one[head] for one in key]) for head, query in enumerate(guide)]
        return [sum(scores) / len(guide) for scores in zip(*by_head)]

    def mlp(self, name, token):
        inner = self.linear(f"{name}.mlp.fc1", self.layernorm(f"{name}.layernorm_after", token))
        return token + self.linear(f"{name}.mlp.fc2", self.activation(inner))

    def run_image(self, image, text, joined=()):
        """
        Return last hidden states (num_tokens, width), and kept indices, scores and candidates by layer. In a single
        stream, `joined` are the states of the text, which come first.
        """
        tokens = self.embed(image)
        if joined:
            of_text, of_image = self.weights["modality_embeddings.weight"]
            tokens = [state + of_text for state in joined] + [token + of_image for token in tokens]
        first = len(joined) + 1  # candidate
        selections = []
        original = list(range(len(tokens) - first))  # index of each candidate's patch, -1 for a fused token
        for number in range(1, self.config.num_hidden_layers + 1):
            name = f"layers.{number - 1}"
            tokens, query, key = self.attend(name, tokens)
            if self.keep_rates.get(number, 1.0) < 1.0:
                guide = query[first - 1]
                if self.guidances[number] == "text" and joined:
                    guide = query[0]
                elif self.guidances[number] == "text" and text is not None:
                    guide = self.heads(self.linear(f"{name}.attention.q_proj", text))
                scores = self.scores_of(guide, key[first:])
                num_kept = math.ceil(Fraction(str(self.keep_rates[number])) * len(scores))
                ranked = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
                kept = sorted(ranked[:num_kept])
                rest = sorted(ranked[num_kept:])
                selections.append(([original[i] for i in kept], torch.stack(scores), original))
                candidates = tokens[first:]
                tokens = tokens[:first] + [candidates[i] for i in kept]
                original = [original[i] for i in kept]
                if self.config.fuse_inattentive_tokens and rest:
                    tokens.append(sum(scores[i] * candidates[i] for i in rest))
                    original.append(-1)
            tokens = [self.mlp(name, token) for token in tokens]
        return torch.stack([self.layernorm("layernorm", token) for token in tokens]), selections

    def __call__(self, images, texts=None):
        """Return one entry per text: `(last_hidden_state, [(kept_indices, scores, candidate_indices), ...])`."""
        if texts is None:
            return [self.run_image(image, None) for image in images]
        if "selection_projection.weight" in self.weights:
            texts = [self.linear("selection_projection", text) for text in texts]
        return [self.run_image(image, text) for image, text in zip(images, texts, strict=True)]
