"""
Reference implementation of TRIPS' vision tower from the definition, with loops over images, heads and tokens.

    q     = W_q t                                        # the guiding text; without one the query of [CLS]
    a     = mean over heads of softmax_i(q . K_i / sqrt(d_head))     # over the candidates, [CLS] left out
    keep  = the ceil(r n) candidates with the largest a, in order; of equal ones the first
    f     = sum over the others of a_i X'_i              # one candidate more for the next selection layer

It shares nothing with the package but the names of the weights.
"""

import math
from fractions import Fraction

import torch


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
    (old_rows, old_columns), (rows, columns) = old_grid, grid
    positions = [table[0]]
    for row in range(rows):
        for column in range(columns):
            total = 0
            for y, weight_y in bicubic_weights((row + 0.5) * old_rows / rows - 0.5):
                for x, weight_x in bicubic_weights((column + 0.5) * old_columns / columns - 0.5):
                    y_inside, x_inside = min(max(y, 0), old_rows - 1), min(max(x, 0), old_columns - 1)
                    total = total + weight_y * weight_x * table[1 + y_inside * old_columns + x_inside]
            positions.append(total)
    return positions


class NaiveVisionTower:
    """
    Args:
        weights: state dict of a `TripsVisionModel` with a linear patch embedding, in float64.
        schedule: keep rate by layer number, from 1.
        guidance: for all selection layers, or by layer number.
    """

    def __init__(
        self,
        weights,
        schedule,
        num_layers,
        num_heads,
        patch_size,
        grid_size,
        eps=1e-6,
        guidance="text",
        fuse=True,
        normalize=False,
        quick_gelu=False,
    ):
        self.weights, self.schedule, self.num_layers, self.num_heads = weights, schedule, num_layers, num_heads
        self.patch_size, self.grid_size, self.eps = patch_size, grid_size, eps
        self.guidance, self.fuse, self.normalize, self.quick_gelu = guidance, fuse, normalize, quick_gelu

    def linear(self, name, x):
        y = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def layernorm(self, name, x):
        centered = x - x.sum() / len(x)
        normed = centered / ((centered**2).sum() / len(x) + self.eps) ** 0.5
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def activation(self, x):
        if self.quick_gelu:
            return x / (1 + torch.exp(-1.702 * x))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def heads(self, vector):
        size = len(vector) // self.num_heads
        return [vector[head * size : (head + 1) * size] for head in range(self.num_heads)]

    def softmax_over(self, query, keys):
        logits = [(query * key).sum() / math.sqrt(len(query)) for key in keys]
        largest = max(logit.item() for logit in logits)
        powers = [torch.exp(logit - largest) for logit in logits]
        return [power / sum(powers) for power in powers]

    def embed(self, image):
        height, width = self.patch_size
        rows, columns = image.shape[1] // height, image.shape[2] // width
        kernel = self.weights["embeddings.patch_embeddings.projection.weight"]
        bias = self.weights.get("embeddings.patch_embeddings.projection.bias", 0)
        tokens = [self.weights["embeddings.cls_token"][0, 0]]
        for row in range(rows):
            for column in range(columns):
                patch = image[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
                tokens.append(torch.stack([(filter_ * patch).sum() for filter_ in kernel]) + bias)
        table = self.weights["embeddings.position_embeddings"][0]
        tokens = [
            token + position for token, position in zip(tokens, positions_for(table, self.grid_size, (rows, columns)))
        ]
        if "pre_layernorm.weight" in self.weights:
            tokens = [self.layernorm("pre_layernorm", token) for token in tokens]
        return tokens

    def run_image(self, image, text):
        """Return last hidden states (num_tokens, width), and kept indices, scores and candidates by layer."""
        tokens, selections = self.embed(image), []
        original = list(range(len(tokens) - 1))
        for number in range(1, self.num_layers + 1):
            name = f"layers.{number - 1}"
            normed = [self.layernorm(f"{name}.layernorm_before", token) for token in tokens]
            query, key, value = (
                [self.heads(self.linear(f"{name}.attention.{part}_proj", token)) for token in normed] for part in "qkv"
            )
            attended = []
            for i in range(len(tokens)):
                mixed = []
                for head in range(self.num_heads):
                    weights = self.softmax_over(query[i][head], [one[head] for one in key])
                    mixed.append(sum(weight * one[head] for weight, one in zip(weights, value)))
                attended.append(tokens[i] + self.linear(f"{name}.attention.o_proj", torch.cat(mixed)))
            tokens = attended

            if self.schedule.get(number, 1.0) < 1.0:
                guide = query[0]
                guidance = self.guidance if isinstance(self.guidance, str) else self.guidance[number]
                if guidance == "text" and text is not None:
                    guide = self.heads(self.linear(f"{name}.attention.q_proj", text))
                per_head = [
                    self.softmax_over(guide[head], [one[head] for one in key[1:]]) for head in range(self.num_heads)
                ]
                scores = [sum(of_heads) / self.num_heads for of_heads in zip(*per_head)]
                num_kept = math.ceil(Fraction(str(self.schedule[number])) * len(scores))
                ranked = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
                kept, rest = sorted(ranked[:num_kept]), sorted(ranked[num_kept:])
                selections.append(([original[i] for i in kept], torch.stack(scores), original))
                candidates, original = tokens[1:], [original[i] for i in kept]
                tokens = [tokens[0]] + [candidates[i] for i in kept]
                if self.fuse and rest:
                    total = sum(scores[i] for i in rest) if self.normalize else 1
                    tokens.append(sum(scores[i] / total * candidates[i] for i in rest))
                    original = original + [-1]

            for i, token in enumerate(tokens):
                inner = self.linear(f"{name}.mlp.fc1", self.layernorm(f"{name}.layernorm_after", token))
                tokens[i] = token + self.linear(f"{name}.mlp.fc2", self.activation(inner))
        return torch.stack([self.layernorm("layernorm", token) for token in tokens]), selections

    def __call__(self, images, texts=None):
        """Return one entry per text: `(last_hidden_state, [(kept_indices, scores, candidate_indices), ...])`."""
        results = []
        for i, image in enumerate(images):
            text = texts[i] if texts is not None else None
            if text is not None and "selection_projection.weight" in self.weights:
                text = self.linear("selection_projection", text)
            results.append(self.run_image(image, text))
        return results
