"""Recall at 1, 5 and 10 of image-text retrieval in both directions, by features and after reranking.

Each image is a query for its texts, and each text is a query for its image. A query succeeds at k if one of its true
candidates is among its k best (as in the evaluations of ALBEF and BLIP).

1. Candidates are ranked by the dot product of features. Ties keep the order of the data.
2. The `rerank_k` best candidates of each query are reranked by the log-odds of the matching head plus similarity over
   temperature. The head is trained to separate true pairs from negatives that are drawn by the softmax of
   similarities, so its log-odds correct that softmax. (BLIP adds the similarity without the temperature to the logit
   of "match"; ALBEF uses that logit alone.) Ties keep their order, and the other candidates follow.

The pairs of both directions are matched together, each once and sorted by image. The cached image states of an image
are computed once for all of its pairs. Each process computes a share of the images; batches do not depend on the
number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_trips import SelectionSchedule, TripsForRetrieval, TripsImageCache, TripsProcessor


RECALL_AT = (1, 5, 10)
# Similarities that are sorted at a time; about 100 MB with indices and workspace.
SIMILARITIES_PER_STEP = 2**22


@dataclass
class TextIndex:
    """
    Encoded texts on the CPU: normalized features, `(num_texts, projection_dim)`, and the token states of each text,
    `(text_length, hidden_size)`.
    """

    embeds: torch.Tensor
    states: tuple[torch.Tensor, ...]


@dataclass
class Ranking:
    """
    The best candidates of each query, best first, and their dot products with the query, both `(num_queries, k)`; and
    the rank, from 0, of the first true candidate, `(num_queries,)`.
    """

    candidates: torch.LongTensor
    similarities: torch.FloatTensor
    first_right: torch.LongTensor


@dataclass
class RetrievalEvaluator:
    """
    Evaluation of retrieval.

    Args:
        model ([`TripsForRetrieval`]): in evaluation mode, a whole unwrapped model in each process.
        batch_size (`int`, *optional*, defaults to 128): number of images, texts or pairs per batch, and of images
            whose cached states are kept.
        num_workers (`int`, *optional*, defaults to 0): worker processes that read images.
        progress (`bool`, *optional*, defaults to `True`): whether the main process shows progress bars.
        schedule ([`SelectionSchedule`], *optional*): in place of the model's.
    """

    model: TripsForRetrieval
    processor: TripsProcessor
    batch_size: int = 128
    num_workers: int = 0
    progress: bool = True
    schedule: SelectionSchedule | None = None

    @torch.no_grad()
    def index_images(self, images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        """Return the normalized features of images on the CPU, `(num_images, projection_dim)`."""
        batches = _batches(len(images), self.batch_size)
        features = {
            number: self.model.get_image_features(pixel_values, schedule=self.schedule).pooler_output.to(
                "cpu", self.model.dtype
            )
            for number, pixel_values in self._load(images, batches, "Images")
        }
        return _finite(torch.cat(_gathered(features)), "image")

    @torch.no_grad()
    def index_texts(self, texts: Sequence[str]) -> TextIndex:
        """Return the features and token states of texts."""
        batches = _batches(len(texts), self.batch_size)
        indexed = {}
        for number in self._own(batches, "Texts"):
            inputs = self.processor(text=[texts[text] for text in batches[number]], return_tensors="pt")
            outputs = self.model.get_text_features(**inputs.to(self.model.device))
            # Each text's tokens are copied, because a view would keep the padding.
            states = outputs.last_hidden_state.to("cpu", self.model.dtype)
            lengths = inputs["attention_mask"].sum(dim=-1).tolist()
            states = tuple(row[:length].clone() for row, length in zip(states, lengths))
            indexed[number] = outputs.pooler_output.to("cpu", self.model.dtype), states
        embeds, states = zip(*_gathered(indexed))
        return TextIndex(_finite(torch.cat(embeds), "text"), sum(states, start=()))

    @torch.no_grad()
    def match(self, images: Sequence[PIL.Image.Image], texts: TextIndex, pairs: torch.LongTensor) -> torch.FloatTensor:
        """
        Return the log-odds of matches, float32 on the CPU, `(num_pairs,)`. Only images of pairs are read. `pairs`,
        `(num_pairs, 2)`, are the numbers of image and text of each pair, sorted by image.
        """
        wanted, image_rows, counts = pairs[:, 0].unique_consecutive(return_inverse=True, return_counts=True)
        chunks = [wanted[rows].tolist() for rows in _batches(len(wanted), self.batch_size)]
        pairs_per_chunk = [int(each.sum()) for each in counts.split(self.batch_size)]
        rows_of_chunk, texts_of_chunk = (each.split(pairs_per_chunk) for each in (image_rows, pairs[:, 1]))
        scores = {}
        for number, pixel_values in self._load(images, chunks, "Matching"):
            image_cache = self.model.model.encode_images(pixel_values, schedule=self.schedule)
            rows = rows_of_chunk[number] - number * self.batch_size
            steps = zip(rows.split(self.batch_size), texts_of_chunk[number].split(self.batch_size))
            # Only images of a step: if no text scores patches, the upper layers run on all cached images.
            parts = [self._match_step(image_cache[i[0] : i[-1] + 1], i - i[0], texts, numbers) for i, numbers in steps]
            scores[number] = torch.cat(parts)
            del image_cache  # before the next one
        return _finite(torch.cat(_gathered(scores)), "pair")

    def _match_step(self, image_cache: TripsImageCache, image_index, texts: TextIndex, text_numbers) -> torch.Tensor:
        device = self.model.device
        numbers, text_index = text_numbers.unique(return_inverse=True)
        states = [texts.states[number] for number in numbers.tolist()]
        lengths = torch.tensor([*map(len, states)])
        logits = self.model.match(
            text_states=pad_sequence(states, batch_first=True).to(device),
            attention_mask=(torch.arange(lengths.max()) < lengths[:, None]).long().to(device),
            text_index=text_index.to(device),
            image_index=image_index.to(device),
            image_cache=image_cache,
            schedule=self.schedule,
        ).itm_logits.float()
        return (logits[:, 1] - logits[:, 0]).cpu()

    def evaluate(
        self,
        images: Sequence[PIL.Image.Image],
        texts: Sequence[str],
        image_of_text: torch.LongTensor,
        rerank_k: int = 16,
    ) -> tuple[dict[str, float], dict[str, Ranking]]:
        """
        Compute recalls in both directions, before and after reranking.

        Args:
            images (`Sequence[PIL.Image.Image]`): distinct images.
            image_of_text (`torch.LongTensor` of shape `(num_texts,)`): image of each text. Each image needs a text.
            rerank_k (`int`, *optional*, defaults to 16): number of candidates of each query to rerank; 0 for none.

        Returns:
            Recalls of the features, `features_i2t_r1` (image to text) to `features_t2i_r10`, and their mean
            `features_r_mean`; with reranking also `i2t_r1` to `t2i_r10`, `r_mean` and `reranked_pairs`. The final
            rankings: texts of each image, `i2t`, and images of each text, `t2i`.
        """
        image_ids = torch.arange(len(images))
        image_embeds, text_index = self.index_images(images), self.index_texts(texts)
        ids = {"i2t": (image_ids, image_of_text), "t2i": (image_of_text, image_ids)}
        embeds = {"i2t": (image_embeds, text_index.embeds), "t2i": (text_index.embeds, image_embeds)}
        found = {name: rank(*embeds[name], *ids[name], rerank_k or max(RECALL_AT)) for name in ids}
        metrics = {f"features_{name}": value for name, value in recalls(found).items()}
        if rerank_k == 0:
            return metrics, found
        # A number for each (image, text) pair of the candidates, ascending by image, then by text.
        of_texts = image_ids[:, None] * len(texts) + found["i2t"].candidates
        of_images = found["t2i"].candidates * len(texts) + torch.arange(len(texts))[:, None]
        keys, places = torch.cat((of_texts.flatten(), of_images.flatten())).unique(return_inverse=True)
        pairs = torch.stack((keys // len(texts), keys % len(texts)), dim=1)
        scores = self.match(images, text_index, pairs)[places].split((of_texts.numel(), of_images.numel()))
        for name, own in zip(ids, scores):
            own = own.view_as(found[name].candidates) + found[name].similarities / self.model.temp().item()
            found[name] = rerank(found[name], own, *ids[name])
        metrics |= {**recalls(found), "reranked_pairs": len(pairs)}
        return metrics, found

    def _load(
        self, images: Sequence[PIL.Image.Image], batches: Sequence[Sequence[int]], title: str
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield number and `pixel_values`, on the model's device, of the image batches of this process."""
        own = self._own(batches, title)
        loader = DataLoader(
            images,
            batch_sampler=[batches[number] for number in own.iterable],
            collate_fn=self._pixel_values,
            num_workers=self.num_workers,
        )
        for number, pixel_values in zip(own, loader):
            yield number, pixel_values.to(self.model.device)

    def _pixel_values(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def _own(self, batches: Sequence, title: str) -> tqdm:
        """Return the numbers of the batches of this process, behind a progress bar."""
        state = PartialState()
        numbers = range(state.process_index, len(batches), state.num_processes)
        return tqdm(numbers, desc=title, disable=not (self.progress and state.is_main_process))


def rank(
    query_embeds: torch.Tensor,
    candidate_embeds: torch.Tensor,
    query_ids: torch.LongTensor,
    candidate_ids: torch.LongTensor,
    k: int,
) -> Ranking:
    """
    Rank all candidates of each query by dot product of embeddings, `(num, dim)`, in float32, and keep `k`. Ties keep
    their order. True candidates have the id of the query, `(num,)`; each query needs one.
    """
    candidate_embeds, parts = candidate_embeds.float(), []
    step = max(1, SIMILARITIES_PER_STEP // len(candidate_ids))
    for queries, ids in zip(query_embeds.split(step), query_ids.split(step)):
        similarities, order = (queries.float() @ candidate_embeds.T).sort(dim=1, descending=True, stable=True)
        first_right = (candidate_ids[order] == ids[:, None]).int().argmax(dim=1)
        parts.append((order[:, :k].clone(), similarities[:, :k].clone(), first_right))
    return Ranking(*map(torch.cat, zip(*parts)))


def rerank(
    ranking: Ranking, scores: torch.Tensor, query_ids: torch.LongTensor, candidate_ids: torch.LongTensor
) -> Ranking:
    """
    Reorder the best candidates of a ranking by `scores`, of the shape of `ranking.candidates`. Ties keep their order,
    and the other candidates follow. Ids as in `rank`.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    candidates = ranking.candidates.gather(1, order)
    right = candidate_ids[candidates] == query_ids[:, None]
    similarities = ranking.similarities.gather(1, order)
    first_right = torch.where(right.any(dim=1), right.int().argmax(dim=1), ranking.first_right)
    return Ranking(candidates, similarities, first_right)


def recalls(found: dict[str, Ranking]) -> dict[str, float]:
    """Return `i2t_r1` (image to text) to `t2i_r10` (text to image) as shares, and their mean `r_mean`."""
    hits = {f"{name}_r{k}": ranking.first_right < k for name, ranking in found.items() for k in RECALL_AT}
    results = {name: hit.double().mean().item() for name, hit in hits.items()}
    return {**results, "r_mean": sum(results.values()) / len(results)}


def _batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _gathered(results: dict[int, Any]) -> list:
    """Return the results of all processes, ordered by batch number."""
    return [result for _, result in sorted(gather_object(list(results.items())), key=lambda item: item[0])]


def _finite(values: torch.Tensor, unit: str) -> torch.Tensor:
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        place = f"{unit} {int(bad[0, 0])} (from 0)"
        raise ValueError(f"The output for {place} is not finite. Check the training, or use a wider dtype.")
    return values
