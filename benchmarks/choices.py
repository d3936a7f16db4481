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

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from torch import nn

from modeling_trips import TripsForQuestionAnswering, modeling_trips_vision
from modeling_trips.patch_selection import TokenChoice, keep_topk, log_scores, num_kept_tokens
from trips_examples import run_vqa
from trips_examples.data.busy_scenes import COLORS
from trips_examples.data.collators import VqaCollator
from trips_examples.training.options import make_parser, run_script
from trips_examples.training.trainer import ImageGroupedTrainer


NUM_DRAWS = 64  # of a perturbed top-k
LEAST_NOISE = 0.05  # share of the noise at the end
FIRST_WORDS = slice(1, 3)  # tokens that tell the kind of a question
NEAR = 60  # largest distance of a pixel from a named color, in RGB

choose_tokens, shorten_tokens = modeling_trips_vision.choose_tokens, modeling_trips_vision.shorten_tokens
compute_loss, prediction_step = ImageGroupedTrainer.compute_loss, ImageGroupedTrainer.prediction_step
encode, forward = VqaCollator.encode, TripsForQuestionAnswering.forward


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
        inside[y0:y1, x0:x1] = 1.1 - 0.1 * np.hypot(rows - (y0 + y1) / 2, columns - (x0 + x1) / 2) / (x1 - x0)
    return share_of_patches(inside, grid)


class Way:
    """A way to choose patches. This one is that of the model. `weight` is the option of that name."""

    def __init__(self, weight: float):
        self.weight = weight

    def encode(self, collator: VqaCollator, images: list, image_index: list[int], rows: list[dict]) -> dict:
        return encode(collator, images, image_index, rows)

    def choose(self, scores: torch.Tensor, keep_rate: float, *args) -> TokenChoice:
        return choose_tokens(scores, keep_rate)

    def shorten(self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool) -> torch.Tensor:
        return shorten_tokens(tokens, scores, choice, fuse)

    def term(self, trainer: ImageGroupedTrainer, inputs: dict, outputs) -> torch.Tensor | float:
        """Return what a training step adds to the loss."""
        return 0.0


class Given(Way):
    """Patches that are chosen by given scores, which learn nothing."""

    def __init__(self, scores_of: Callable[[PIL.Image.Image, dict, tuple[int, int]], torch.Tensor]):
        self.scores_of = scores_of

    def encode(self, collator: VqaCollator, images: list, image_index: list[int], rows: list[dict]) -> dict:
        """Return a batch with the scores of its questions, `(batch_size, num_patches)`, which add up to 1."""
        batch = encode(collator, images, image_index, rows)
        grid = tuple(length // collator.processor.patch_size for length in batch["pixel_values"].shape[-2:])
        scores = torch.stack([self.scores_of(images[image], row, grid) for image, row in zip(image_index, rows)])
        scores = scores + 1e-6 * torch.rand_like(scores)  # equal ones in random order
        return {**batch, "given_scores": scores / scores.sum(dim=1, keepdim=True)}

    def choose(self, scores: torch.Tensor, keep_rate: float, *args) -> TokenChoice:
        return choose_tokens(self.scores, keep_rate)

    def shorten(self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool) -> torch.Tensor:
        return shorten_tokens(tokens, self.scores, choice, fuse)


class Gumbel(Way):
    """Patches that are drawn by their scores; kept ones are weighted, see [`weights`]."""

    def choose(self, scores: torch.Tensor, keep_rate: float, *args) -> TokenChoice:
        if not scores.requires_grad:  # in evaluation
            return choose_tokens(scores, keep_rate)
        logits = log_scores(scores)
        self.noisy = logits - torch.empty_like(logits).exponential_().log()
        self.kept = keep_topk(self.noisy.detach(), num_kept_tokens(scores.shape[1], keep_rate))
        return TokenChoice(self.kept)

    def weights(self) -> torch.Tensor:
        """Return ones, `(batch_size, num_kept)`, with the gradient of the estimator."""
        share = (self.noisy / self.weight).softmax(dim=-1).gather(1, self.kept)
        return 1 + share - share.detach()

    def shorten(self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool) -> torch.Tensor:
        states = shorten_tokens(tokens, scores, choice, fuse)
        if not scores.requires_grad:
            return states
        first, number = tokens.shape[1] - scores.shape[1], choice.kept.shape[1]
        factors = nn.functional.pad(self.weights(), (first, states.shape[1] - first - number), value=1.0)
        return states * factors.unsqueeze(-1).to(states.dtype)


class Reinforce(Gumbel):
    """Adds to the loss the log probability of the draws, times what they cost."""

    def weights(self) -> torch.Tensor:
        return torch.ones_like(self.kept, dtype=torch.float32)

    def log_probability(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the log probability of the kept patches in the order of their draw, `(batch_size,)`."""
        order = self.kept.gather(1, self.noisy.gather(1, self.kept).argsort(dim=-1, descending=True))
        logits, total = log_scores(scores), 0.0
        for position in order.split(1, dim=1):
            total = total + (logits.gather(1, position) - logits.logsumexp(dim=-1, keepdim=True)).squeeze(1)
            logits = logits.scatter(1, position, float("-inf"))
        return total

    def term(self, trainer: ImageGroupedTrainer, inputs: dict, outputs) -> torch.Tensor:
        logits, labels = outputs.logits.detach().float().transpose(1, 2), inputs["labels"]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none").sum(dim=1)
        words = inputs["input_ids"][:, FIRST_WORDS]
        alike = (words[:, None] == words[None]).all(dim=-1).float()
        others = alike.sum(dim=1) - 1
        costs = (losses - (alike @ losses - losses) / others.clamp(min=1)) * (others > 0)
        log_probability = self.log_probability(outputs.selection[-1].scores)
        return self.weight * (costs * log_probability).sum() / (labels != -100).sum()


class PerturbedTopK(torch.autograd.Function):
    """The mean of the one-hot choices `(batch_size, num_kept, num_candidates)` under noise."""

    @staticmethod
    def forward(ctx, logits, num_kept, noise):
        normal = torch.randn(logits.shape[0], NUM_DRAWS, logits.shape[1])
        chosen = (logits[:, None] + noise * normal).topk(num_kept, dim=-1).indices.sort(dim=-1).values
        choices = nn.functional.one_hot(chosen, logits.shape[1]).to(logits.dtype)
        ctx.save_for_backward(choices, normal)
        ctx.noise = noise
        return choices.mean(dim=1)

    @staticmethod
    def backward(ctx, gradient):
        choices, normal = ctx.saved_tensors
        weights = torch.einsum("bnkd,bkd->bn", choices, gradient)
        return torch.einsum("bn,bnd->bd", weights, normal) / (NUM_DRAWS * ctx.noise), None, None


class Perturbed(Way):
    progress = 0.0

    def term(self, trainer: ImageGroupedTrainer, inputs: dict, outputs) -> float:
        self.progress = trainer.state.global_step / trainer.state.max_steps
        return 0.0

    def shorten(self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool) -> torch.Tensor:
        states = shorten_tokens(tokens, scores, choice, fuse)
        if not scores.requires_grad:
            return states
        first, number = tokens.shape[1] - scores.shape[1], choice.kept.shape[1]
        noise = self.weight * max(LEAST_NOISE, 1 - self.progress)
        choices, candidates = PerturbedTopK.apply(log_scores(scores), number, noise), tokens[:, first:]
        parts = [states[:, :first], choices @ candidates]
        if fuse:
            parts.append((scores * (1 - choices.sum(dim=1))).unsqueeze(1) @ candidates)
        return torch.cat(parts, dim=1)


WAYS: dict[str, Callable[[float], Way]] = {
    "gumbel": Gumbel,
    "reinforce": Reinforce,
    "perturbed": Perturbed,
    "color": lambda weight: Given(by_color),
    "region": lambda weight: Given(by_region),
    "random": lambda weight: Given(lambda image, row, grid: torch.zeros(grid).flatten()),
}
WEIGHTS = {"gumbel": 3.0, "reinforce": 0.25, "perturbed": 32.0}  # chosen on validation scenes of one start


@dataclass
class ChoiceArguments:
    choice: str = field(metadata={"help": "How patches are chosen.", "choices": [*WAYS]})
    weight: float | None = field(
        default=None, metadata={"help": "Temperature, weight in the loss, or noise. Default: the best that was tried."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = make_parser(ChoiceArguments, description=__doc__)
    args, options = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    way = WAYS[args.choice](WEIGHTS.get(args.choice, 0.0) if args.weight is None else args.weight)

    def forward_with_scores(model, *args, given_scores=None, **kwargs):
        if given_scores is not None:
            way.scores = given_scores
        return forward(model, *args, **kwargs)

    def loss_with_term(trainer, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = compute_loss(trainer, model, inputs, return_outputs=True, **kwargs)
        if model.training:
            loss = loss + way.term(trainer, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def step_of_evaluation(trainer, model, inputs, *args, **kwargs):
        way.scores = inputs.pop("given_scores", None)  # `generate` takes none
        return prediction_step(trainer, model, inputs, *args, **kwargs)

    modeling_trips_vision.choose_tokens = way.choose
    modeling_trips_vision.shorten_tokens = way.shorten
    TripsForQuestionAnswering.forward = functools.wraps(forward)(forward_with_scores)
    ImageGroupedTrainer.compute_loss = loss_with_term
    ImageGroupedTrainer.prediction_step = step_of_evaluation
    VqaCollator.encode = lambda *args: way.encode(*args)
    return run_vqa.main(options)


if __name__ == "__main__":
    run_script(main)
