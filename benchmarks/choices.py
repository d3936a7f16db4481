"""
Train on questions, or answer them, with patches that are chosen in another way than by a trained model's scores.

    python benchmarks/choices.py --choice reinforce --model START --schedule 2:text:0.005 \
        --texts_per_image 8 --max_steps 400 --output_dir outputs/reinforce
    python benchmarks/choices.py --choice color --do_train False --model examples/trips-tiny-scenes-unpruned \
        --schedule 2:text:0.005 --output_dir outputs/color

The other options are those of `run_vqa.py`, for a schedule of one layer that the text scores. In the place of the
gate, where patches are drawn in training and the scores learn from the answers through the drawn patches alone:

- `gumbel`: straight-through Gumbel top-k (https://arxiv.org/abs/1903.06059). A kept patch is multiplied by 1, with the
  gradient of its share in the softmax of the perturbed log scores, of temperature `--weight`.
- `reinforce`: the gradient of the log probability of the draw times the loss of its answer, less the mean loss of the
  other questions with the same first words, times `--weight`.
- `perturbed`: perturbed top-k (https://arxiv.org/abs/2104.03059). Kept patches are means over draws of log scores with
  Gaussian noise of `--weight`, which falls linearly to a twentieth.

In the place of the scores, so that only what follows learns: `color`, patches with most of the color that a question
names (without one, or equal: in random order); `region`, those of the shape that it is about; `random`.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn

from modeling_trips import TripsForQuestionAnswering
from modeling_trips.patch_selection import TokenChoice, TokenSelector, keep_topk, log_scores, num_kept_tokens
from trips_examples import run_vqa
from trips_examples.data.busy_scenes import COLORS
from trips_examples.data.collators import VqaCollator
from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script
from trips_examples.training.runs import parse_arguments
from trips_examples.training.trainer import ImageGroupedTrainer


NUM_DRAWS = 64  # of a perturbed top-k
LEAST_NOISE = 0.05  # share of the noise at the end
FIRST_WORDS = slice(1, 3)  # tokens that tell the kind of a question
NEAR = 60  # largest distance of a pixel from a named color, in RGB


# Scores that are given


def share_of_patches(pixels: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Return the mean of pixels, `(height, width)`, in each patch, as `(num_patches,)`."""
    return nn.functional.adaptive_avg_pool2d(torch.tensor(pixels, dtype=torch.float32)[None], grid).flatten()


def by_color(image: PIL.Image.Image, row: dict, grid: tuple[int, int]) -> torch.Tensor:
    """Return the share of pixels near the color that a question names. Where it names none, all patches are equal."""
    near = np.zeros(image.size[::-1])
    for color in COLORS.keys() & row["question"].strip("?").split():  # at most one
        near = np.linalg.norm(np.asarray(image, dtype=float) - COLORS[color], axis=-1) < NEAR
    return share_of_patches(near, grid)


def by_region(image: PIL.Image.Image, row: dict, grid: tuple[int, int]) -> torch.Tensor:
    """Return the share of pixels in the region of a question, more near its center; all are equal if there is none."""
    inside = np.zeros(image.size[::-1])
    if row["region"]:
        x0, y0, x1, y1 = (round(value) for value in row["region"])
        rows, columns = np.mgrid[y0:y1, x0:x1] + 0.5
        from_center_y = rows - (y0 + y1) / 2
        from_center_x = columns - (x0 + x1) / 2
        distances = np.hypot(from_center_y, from_center_x) / (x1 - x0)
        inside[y0:y1, x0:x1] = 1.1 - 0.1 * distances
    return share_of_patches(inside, grid)


def all_equal(image: PIL.Image.Image, row: dict, grid: tuple[int, int]) -> torch.Tensor:
    return torch.zeros(grid).flatten()


# Ways to choose


class Way(TokenSelector):
    """A way to choose, and what the trainer tells it. `weight` is the option of that name."""

    def __init__(self, weight: float):
        self.weight = weight
        self.progress = 0.0  # share of the training that is over


class Given(TokenSelector):
    """Patches that are chosen by given scores, `(batch_size, num_patches)`, which learn nothing."""

    def __init__(self, scores_of: Callable[[PIL.Image.Image, dict, tuple[int, int]], torch.Tensor]):
        self.scores_of = scores_of
        self.scores: torch.Tensor | None = None

    def choose(self, scores: torch.Tensor, keep_rate: float) -> TokenChoice:
        return super().choose(self.scores, keep_rate)

    def shorten(
        self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool = True
    ) -> torch.Tensor:
        return super().shorten(tokens, self.scores, choice, fuse)


class Gumbel(Way):
    """Patches that are drawn by their scores; kept ones are weighted, see [`weights`]."""

    def choose(self, scores: torch.Tensor, keep_rate: float) -> TokenChoice:
        if not scores.requires_grad:  # in evaluation
            return super().choose(scores, keep_rate)
        logits = log_scores(scores)
        self.noisy = logits - torch.empty_like(logits).exponential_().log()
        self.kept = keep_topk(self.noisy.detach(), num_kept_tokens(scores.shape[1], keep_rate))
        return TokenChoice(self.kept)

    def weights(self) -> torch.Tensor:
        """Return ones, `(batch_size, num_kept)`, with the gradient of the estimator."""
        shares = (self.noisy / self.weight).softmax(dim=-1).gather(1, self.kept)
        return 1 + shares - shares.detach()

    def shorten(
        self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool = True
    ) -> torch.Tensor:
        states = super().shorten(tokens, scores, choice, fuse)
        if not scores.requires_grad:
            return states
        num_before = tokens.shape[1] - scores.shape[1]
        num_behind = states.shape[1] - num_before - choice.kept.shape[1]
        factors = nn.functional.pad(self.weights(), (num_before, num_behind), value=1.0)
        factors = factors.unsqueeze(-1).to(states.dtype)
        return states * factors


class Reinforce(Gumbel):
    """Adds to the loss the log probability of the draws, times what they cost."""

    def weights(self) -> torch.Tensor:
        return torch.ones_like(self.kept, dtype=torch.float32)

    def log_probability(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the log probability of the kept patches in the order of their draw, `(batch_size,)`."""
        order = self.noisy.gather(1, self.kept).argsort(dim=-1, descending=True)
        drawn = self.kept.gather(1, order)
        logits = log_scores(scores)
        total = 0.0
        for position in drawn.split(1, dim=1):
            log_share = logits.gather(1, position) - logits.logsumexp(dim=-1, keepdim=True)
            total = total + log_share.squeeze(1)
            logits = logits.scatter(1, position, float("-inf"))
        return total

    def loss_term(self, inputs: dict, outputs: Any) -> torch.Tensor | float:
        labels = inputs["labels"]
        logits = outputs.logits.detach().float().transpose(1, 2)  # (num_texts, vocab_size, label_length)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        losses = losses.sum(dim=1)  # (num_texts,)
        words = inputs["input_ids"][:, FIRST_WORDS]
        is_alike = (words[:, None] == words[None]).all(dim=-1)
        is_alike = is_alike.float()  # (num_texts, num_texts)
        num_others = is_alike.sum(dim=1) - 1
        sum_of_others = is_alike @ losses - losses
        mean_of_others = sum_of_others / num_others.clamp(min=1)
        costs = (losses - mean_of_others) * (num_others > 0)
        log_probability = self.log_probability(outputs.selection[-1].scores)
        num_tokens = (labels != -100).sum()
        return self.weight * (costs * log_probability).sum() / num_tokens


class PerturbedTopK(torch.autograd.Function):
    """The mean of the one-hot choices `(batch_size, num_kept, num_candidates)` under noise."""

    @staticmethod
    def forward(ctx, logits, num_kept, noise):
        batch_size, num_candidates = logits.shape
        normal = torch.randn(batch_size, NUM_DRAWS, num_candidates)
        perturbed = logits[:, None] + noise * normal
        chosen = perturbed.topk(num_kept, dim=-1).indices.sort(dim=-1).values
        # (batch_size, NUM_DRAWS, num_kept, num_candidates)
        choices = nn.functional.one_hot(chosen, num_candidates).to(logits.dtype)
        ctx.save_for_backward(choices, normal)
        ctx.noise = noise
        return choices.mean(dim=1)

    @staticmethod
    def backward(ctx, gradient):
        choices, normal = ctx.saved_tensors
        weights = torch.einsum("bnkd,bkd->bn", choices, gradient)
        return torch.einsum("bn,bnd->bd", weights, normal) / (NUM_DRAWS * ctx.noise), None, None


class Perturbed(Way):
    def shorten(
        self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool = True
    ) -> torch.Tensor:
        if not scores.requires_grad:  # in evaluation
            return super().shorten(tokens, scores, choice, fuse)
        num_candidates = scores.shape[1]
        others, candidates = tokens.split((tokens.shape[1] - num_candidates, num_candidates), dim=1)
        noise = self.weight * max(LEAST_NOISE, 1 - self.progress)
        choices = PerturbedTopK.apply(log_scores(scores), choice.kept.shape[1], noise)
        parts = [others, choices @ candidates]
        if fuse:
            weights = scores * (1 - choices.sum(dim=1))
            parts.append(weights.unsqueeze(1) @ candidates)
        return torch.cat(parts, dim=1)


WAYS: dict[str, Callable[[float], TokenSelector]] = {
    "gumbel": Gumbel,
    "reinforce": Reinforce,
    "perturbed": Perturbed,
    "color": lambda weight: Given(by_color),
    "region": lambda weight: Given(by_region),
    "random": lambda weight: Given(all_equal),
}
WEIGHTS = {"gumbel": 3.0, "reinforce": 0.25, "perturbed": 32.0}  # chosen on validation scenes of one start


# Training with them


@dataclass
class GivenScoresCollator(VqaCollator):
    """Collator that adds the scores of the questions, `given_scores` of shape `(batch_size, num_patches)`."""

    way: Given | None = None

    def encode(self, images: list, image_index: list[int], rows: list[dict]) -> dict:
        batch = super().encode(images, image_index, rows)
        patch_size = self.processor.patch_size
        height, width = batch["pixel_values"].shape[-2:]
        grid = (height // patch_size, width // patch_size)
        by_question = []
        for image, row in zip(image_index, rows):
            by_question.append(self.way.scores_of(images[image], row, grid))
        scores = torch.stack(by_question)  # (batch_size, num_patches)
        scores = scores + 1e-6 * torch.rand_like(scores)  # equal ones in random order
        batch["given_scores"] = scores / scores.sum(dim=1, keepdim=True)
        return batch


class ChoiceTrainer(ImageGroupedTrainer):
    """Trainer of a model whose layers choose in this way."""

    def __init__(self, *args, way: TokenSelector, **kwargs):
        super().__init__(*args, **kwargs)
        self.way = way
        self.model.base_model.vision_model.selector = way
        self.model.register_forward_pre_hook(self.take_scores, with_kwargs=True)

    def take_scores(self, model: TripsForQuestionAnswering, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        """Give the scores among the inputs of the model to the way to choose."""
        if "given_scores" in inputs:
            self.way.scores = inputs.pop("given_scores")
        return args, inputs

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if model.training:
            self.way.progress = self.state.global_step / self.state.max_steps
        return result

    def prediction_step(self, model, inputs, *args, **kwargs):
        _, inputs = self.take_scores(model, (), inputs)  # `generate` takes none
        return super().prediction_step(model, inputs, *args, **kwargs)


@dataclass
class ChoiceArguments:
    choice: str = option(MISSING, "How patches are chosen.", choices=[*WAYS])
    weight: float | None = option(None, "Temperature, weight in the loss, or noise. Default: the best that was tried.")


OPTIONS = make_parser(
    ChoiceArguments, *run_vqa.OPTIONS.classes, description=__doc__, script=__name__, task=run_vqa.OPTIONS.task
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args, model_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    weight = WEIGHTS.get(args.choice, 0.0) if args.weight is None else args.weight
    way = WAYS[args.choice](weight)
    return run_vqa.train_question_answering(
        model_args,
        data_args,
        training_args,
        trainer_class=partial(ChoiceTrainer, way=way),
        collator_class=partial(GivenScoresCollator, way=way) if isinstance(way, Given) else VqaCollator,
    )


if __name__ == "__main__":
    run_script(main)
