"""
Train on questions with another estimator in the place of the gate: patches are drawn by their scores, and the scores
learn from the answers through the drawn patches alone.

    python benchmarks/estimators.py --estimator reinforce --weight 0.25 --model START --selection_layers 2 \
        --keep_rate 0.005 --texts_per_image 8 --max_steps 800 --output_dir outputs/reinforce

The other options are those of `run_vqa.py`, for a schedule of one layer that the text scores. The estimators:

- `gumbel`: straight-through Gumbel top-k (https://arxiv.org/abs/1903.06059). A kept patch is multiplied by 1, with the
  gradient of its share in the softmax of the perturbed log scores, of temperature `--weight`.
- `reinforce`: the gradient of the log probability of the draw times the loss of its answer, less the mean loss of the
  other questions with the same first words, times `--weight`.
- `perturbed`: perturbed top-k (https://arxiv.org/abs/2104.03059). Kept patches are means over draws of log scores with
  Gaussian noise of `--weight`, which falls linearly to a twentieth.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from modeling_trips import modeling_trips_vision
from modeling_trips.patch_selection import Choice, keep_topk, log_scores, num_kept_tokens
from trips_examples import run_vqa
from trips_examples.training.options import make_parser, run_script
from trips_examples.training.trainer import ImageGroupedTrainer


NUM_DRAWS = 64  # of a perturbed top-k
LEAST_NOISE = 0.05  # share of the noise at the end
FIRST_WORDS = slice(1, 3)  # tokens that tell the kind of a question

choose_tokens, shorten_tokens = modeling_trips_vision.choose_tokens, modeling_trips_vision.shorten_tokens
compute_loss = ImageGroupedTrainer.compute_loss


class Gumbel:
    """Patches that are drawn by their scores; kept ones are weighted, see [`weights`]."""

    def __init__(self, weight: float):
        self.weight = weight

    def choose(self, scores: torch.Tensor, keep_rate: float, *args) -> Choice:
        if not scores.requires_grad:  # in evaluation
            return choose_tokens(scores, keep_rate)
        logits = log_scores(scores)
        self.noisy = logits - torch.empty_like(logits).exponential_().log()
        self.kept = keep_topk(self.noisy.detach(), num_kept_tokens(scores.shape[1], keep_rate))
        return Choice(self.kept)

    def weights(self) -> torch.Tensor:
        """Return ones, `(batch_size, num_kept)`, with the gradient of the estimator."""
        share = (self.noisy / self.weight).softmax(dim=-1).gather(1, self.kept)
        return 1 + share - share.detach()

    def shorten(self, tokens: torch.Tensor, scores: torch.Tensor, choice: Choice, fuse: bool) -> torch.Tensor:
        states = shorten_tokens(tokens, scores, choice, fuse)
        if not scores.requires_grad:
            return states
        first, number = tokens.shape[1] - scores.shape[1], choice.kept.shape[1]
        factors = nn.functional.pad(self.weights(), (first, states.shape[1] - first - number), value=1.0)
        return states * factors.unsqueeze(-1).to(states.dtype)

    def term(self, trainer: ImageGroupedTrainer, inputs: dict, outputs) -> torch.Tensor | float:
        """Return what a training step adds to the loss."""
        return 0.0


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


class Perturbed(Gumbel):
    progress = 0.0

    def term(self, trainer: ImageGroupedTrainer, inputs: dict, outputs) -> float:
        self.progress = trainer.state.global_step / trainer.state.max_steps
        return 0.0

    def choose(self, scores: torch.Tensor, keep_rate: float, *args) -> Choice:
        return choose_tokens(scores, keep_rate)

    def shorten(self, tokens: torch.Tensor, scores: torch.Tensor, choice: Choice, fuse: bool) -> torch.Tensor:
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


ESTIMATORS: dict[str, Callable[[float], Gumbel]] = {"gumbel": Gumbel, "reinforce": Reinforce, "perturbed": Perturbed}


@dataclass
class EstimatorArguments:
    estimator: str = field(metadata={"help": "Estimator to train with.", "choices": list(ESTIMATORS)})
    weight: float = field(default=1.0, metadata={"help": "Temperature, weight of the term of the loss, or noise."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = make_parser(EstimatorArguments, description=__doc__)
    args, options = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    estimator = ESTIMATORS[args.estimator](args.weight)

    def loss_with_term(trainer, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = compute_loss(trainer, model, inputs, return_outputs=True, **kwargs)
        if model.training:
            loss = loss + estimator.term(trainer, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    modeling_trips_vision.choose_tokens = estimator.choose
    modeling_trips_vision.shorten_tokens = estimator.shorten
    ImageGroupedTrainer.compute_loss = loss_with_term
    return run_vqa.main(options)


if __name__ == "__main__":
    run_script(main)
