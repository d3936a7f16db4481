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
from itertools import chain
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
        features = {}
        for number, pixel_values in self._load(images, batches, "Images"):
            features[number] = self.image_features(pixel_values)
        return finite(torch.cat(_gathered(features)), "image")

    @torch.no_grad()
    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the normalized features of a batch of images on the CPU, `(num_images, projection_dim)`."""
        outputs = self.model.get_image_features(pixel_values.to(self.model.device), schedule=self.schedule)
        return outputs.pooler_output.to("cpu", self.model.dtype)

    @torch.no_grad()
    def index_texts(self, texts: Sequence[str]) -> TextIndex:
        """Return the features and token states of texts."""
        batches = _batches(len(texts), self.batch_size)
        indexed = {}
        for number in self._own(batches, "Texts"):
            texts_of_batch = [texts[text] for text in batches[number]]
            inputs = self.processor(text=texts_of_batch, return_tensors="pt").to(self.model.device)
            outputs = self.model.get_text_features(**inputs)
            embeds = outputs.pooler_output.to("cpu", self.model.dtype)  # (num_texts, projection_dim)
            padded = outputs.last_hidden_state.to("cpu", self.model.dtype)  # (num_texts, longest, hidden_size)
            lengths = inputs["attention_mask"].sum(dim=-1).tolist()
            # Each text's tokens are copied, because a view would keep the padding.
            states = [row[:length].clone() for row, length in zip(padded, lengths)]
            indexed[number] = (embeds, states)
        all_embeds, all_states = zip(*_gathered(indexed))
        return TextIndex(embeds=finite(torch.cat(all_embeds), "text"), states=tuple(chain.from_iterable(all_states)))

    @torch.no_grad()
    def match(self, images: Sequence[PIL.Image.Image], texts: TextIndex, pairs: torch.LongTensor) -> torch.FloatTensor:
        """
        Return the log-odds of matches, float32 on the CPU, `(num_pairs,)`. Only images of pairs are read. `pairs`,
        `(num_pairs, 2)`, are the numbers of image and text of each pair, sorted by image.
        """
        distinct, pairs_per_image = pairs[:, 0].unique_consecutive(return_counts=True)
        chunks = distinct.split(self.batch_size)
        pairs_per_chunk = [int(counts.sum()) for counts in pairs_per_image.split(self.batch_size)]
        pairs_of_chunk = pairs.split(pairs_per_chunk)
        scores = {}
        for number, pixel_values in self._load(images, [chunk.tolist() for chunk in chunks], "Matching"):
            image_cache = self.model.model.encode_images(pixel_values, schedule=self.schedule)
            scores_of_steps = []
            for step in pairs_of_chunk[number].split(self.batch_size):
                image_numbers, text_numbers = step.T.contiguous()
                image_index = torch.searchsorted(chunks[number], image_numbers)  # places in the chunk
                first = image_index[0]
                end = image_index[-1] + 1
                # Only images of a step: if no text scores patches, the upper layers run on all cached images. No name
                # keeps them, so that the cache is gone before the next one.
                scores_of_steps.append(
                    self._match_step(image_cache[first:end], image_index - first, texts, text_numbers)
                )
            scores[number] = torch.cat(scores_of_steps)
            del image_cache
        return finite(torch.cat(_gathered(scores)), "pair")

    def _match_step(self, image_cache: TripsImageCache, image_index, texts: TextIndex, text_numbers) -> torch.Tensor:
        device = self.model.device
        numbers, text_index = text_numbers.unique(return_inverse=True)
        states = [texts.states[number] for number in numbers.tolist()]
        lengths = torch.tensor([len(state) for state in states])
        attention_mask = torch.arange(lengths.max()) < lengths[:, None]  # (num_texts, longest)
        logits = self.model.match(
            text_states=pad_sequence(states, batch_first=True).to(device),
            attention_mask=attention_mask.long().to(device),
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
        image_embeds = self.index_images(images)
        text_index = self.index_texts(texts)
        k = rerank_k or max(RECALL_AT)
        # Of the queries, and of the candidates.
        ids = {"i2t": (image_ids, image_of_text), "t2i": (image_of_text, image_ids)}
        found = {
            "i2t": rank(image_embeds, text_index.embeds, *ids["i2t"], k),
            "t2i": rank(text_index.embeds, image_embeds, *ids["t2i"], k),
        }
        metrics = {f"features_{name}": value for name, value in recalls(found).items()}
        if rerank_k == 0:
            return metrics, found

        # A number for each (image, text) pair of the candidates, ascending by image, then by text.
        num_texts = len(texts)
        i2t_numbers = image_ids[:, None] * num_texts + found["i2t"].candidates  # (num_images, k)
        t2i_numbers = found["t2i"].candidates * num_texts + torch.arange(num_texts)[:, None]  # (num_texts, k)
        both_numbers = torch.cat((i2t_numbers.flatten(), t2i_numbers.flatten()))
        distinct, places = both_numbers.unique(return_inverse=True)
        pairs = torch.stack((distinct // num_texts, distinct % num_texts), dim=1)
        log_odds = self.match(images, text_index, pairs)[places]
        temperature = self.model.temp().item()
        both_log_odds = log_odds.split((i2t_numbers.numel(), t2i_numbers.numel()))
        for (name, ranking), own_log_odds in zip(found.items(), both_log_odds):
            scores = own_log_odds.view_as(ranking.candidates) + ranking.similarities / temperature
            found[name] = rerank(ranking, scores, *ids[name])
        metrics |= recalls(found)
        metrics["reranked_pairs"] = len(pairs)
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
    candidate_embeds = candidate_embeds.float()
    step = max(1, SIMILARITIES_PER_STEP // len(candidate_ids))
    candidates = []
    best_similarities = []
    first_right = []
    for embeds, ids in zip(query_embeds.split(step), query_ids.split(step)):
        similarities = embeds.float() @ candidate_embeds.T  # (num_queries, num_candidates)
        similarities, order = similarities.sort(dim=1, descending=True, stable=True)
        is_right = candidate_ids[order] == ids[:, None]
        candidates.append(order[:, :k].clone())
        best_similarities.append(similarities[:, :k].clone())
        first_right.append(is_right.int().argmax(dim=1))
    return Ranking(
        candidates=torch.cat(candidates),
        similarities=torch.cat(best_similarities),
        first_right=torch.cat(first_right),
    )


def rerank(
    ranking: Ranking, scores: torch.Tensor, query_ids: torch.LongTensor, candidate_ids: torch.LongTensor
) -> Ranking:
    """
    Reorder the best candidates of a ranking by `scores`, of the shape of `ranking.candidates`. Ties keep their order,
    and the other candidates follow. Ids as in `rank`.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    candidates = ranking.candidates.gather(1, order)
    is_right = candidate_ids[candidates] == query_ids[:, None]  # (num_queries, k)
    rank_among_best = is_right.int().argmax(dim=1)
    return Ranking(
        candidates=candidates,
        similarities=ranking.similarities.gather(1, order),
        first_right=torch.where(is_right.any(dim=1), rank_among_best, ranking.first_right),
    )


def recalls(found: dict[str, Ranking]) -> dict[str, float]:
    """Return `i2t_r1` (image to text) to `t2i_r10` (text to image) as shares, and their mean `r_mean`."""
    results = {}
    for name, ranking in found.items():
        for k in RECALL_AT:
            is_found = ranking.first_right < k
            results[f"{name}_r{k}"] = is_found.double().mean().item()
    results["r_mean"] = sum(results.values()) / len(results)
    return results


def _batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _gathered(results: dict[int, Any]) -> list:
    """Return the results of all processes, ordered by batch number."""
    by_number = dict(gather_object(list(results.items())))
    return [by_number[number] for number in sorted(by_number)]


def finite(values: torch.Tensor, unit: str) -> torch.Tensor:
    """Return outputs. Raise a `ValueError` for the first `unit` whose outputs are not finite."""
    bad = (~values.isfinite()).nonzero()  # (num_bad, values.ndim)
    if len(bad):
        place = f"{unit} {int(bad[0, 0])} (from 0)"
        raise ValueError(f"The output for {place} is not finite. Check the training, or use a wider dtype.")
    return values
