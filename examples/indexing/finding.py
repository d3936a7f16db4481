"""
Search in two stages: features find the best `k` images of the table, and matching reranks them with patches that are
scored by the text.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import PIL.Image
import torch

from modeling_trips.inspection import draw_kept_patches
from trips_examples.data.images import DecodedImages, check_image, decode_untrusted_image, path_or_bytes
from trips_examples.data.printing import visible
from trips_examples.data.tasks import BadRowError
from trips_examples.indexing.table import fingerprint_of, load_model, open_table
from trips_examples.metrics.retrieval import RetrievalEvaluator, TextIndex


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """
    A search result: the source of an image, its path or encoded form, and the cosine similarity of its features and
    the query's. After reranking also `match`, the probability that image and text match, and `score`, its log-odds
    plus similarity over temperature, which ranks the images of one text.
    """

    source: str
    image: str | bytes
    similarity: float
    score: float | None = None
    match: float | None = None


class Finder:
    """
    Search in the table at `uri` with the model that made it, a checkpoint and its schedule as in `load_model`. Another
    model, or a missing table or checkpoint raise a `ValueError` or `OSError`.
    """

    def __init__(self, uri: str, checkpoint: str, schedule: str | None = None, device: str = "cpu"):
        self.model, self.processor = load_model(checkpoint, schedule, device=device)
        self.table = open_table(uri, fingerprint_of(self.model, self.processor))
        self.evaluator = RetrievalEvaluator(self.model, self.processor, batch_size=32, progress=False)

    def describe_texts(self, texts: Sequence[str]) -> TextIndex:
        """Return the features of texts and the states for matching."""
        return self.evaluator.index_texts(texts)

    def nearest(self, features: torch.Tensor, k: int, probes: int = 20) -> list[list[Found]]:
        """
        Return for each query, `(num_queries, projection_dim)`, the `k` images of the highest cosine similarity, best
        first. An index is searched in `probes` partitions.
        """
        found = []
        for query in features.float().numpy():
            nearest = {
                "column": "vector",
                "q": query,
                "k": k,
                "metric": "cosine",
                "nprobes": probes,
                "refine_factor": 10,  # 10 k candidates are compared by their exact vectors
            }
            rows = self.table.to_table(columns=["source", "image", "_distance"], nearest=nearest).to_pylist()
            found_by_query = []
            for row in rows:
                image = path_or_bytes(row["image"])
                found_by_query.append(Found(source=row["source"], image=image, similarity=1 - row["_distance"]))
            found.append(found_by_query)
        return found

    def rerank(self, texts: TextIndex, found: list[list[Found]]) -> list[list[Found]]:
        """
        Rerank the results of each text by matching. The cached image states are shared among texts. Images that can no
        longer be read are left out with a warning.
        """
        found = self._readable(found)
        images = _images_of(found)
        image_numbers = {source: number for number, source in enumerate(images)}
        pairs = []  # (image, text)
        for text, found_by_text in enumerate(found):
            pairs += [(image_numbers[each.source], text) for each in found_by_text]
        if not pairs:
            return found
        pairs.sort()
        decoded = DecodedImages(list(images.values()), decode_untrusted_image)
        scores = self.evaluator.match(decoded, texts, torch.tensor(pairs)).double()  # (num_pairs,)
        log_odds = dict(zip(pairs, scores.tolist()))
        probabilities = dict(zip(pairs, scores.sigmoid().tolist()))
        temperature = self.model.temp().item()
        reranked = []
        for text, found_by_text in enumerate(found):
            scored = []
            for each in found_by_text:
                pair = image_numbers[each.source], text
                score = log_odds[pair] + each.similarity / temperature
                scored.append(replace(each, score=score, match=probabilities[pair]))
            reranked.append(sorted(scored, key=lambda each: each.score, reverse=True))
        return reranked

    def _readable(self, found: list[list[Found]]) -> list[list[Found]]:
        faults = set()
        for source, image in _images_of(found).items():
            try:
                check_image(image, self.processor.patch_size, decode=False)
            except BadRowError as error:
                faults.add(source)
                logger.warning(visible(f"Left out {source}: {error}."))
        return [[each for each in row if each.source not in faults] for row in found]

    @torch.inference_mode()
    def draw(self, found: Sequence[Found], text: str | None = None) -> dict[str, PIL.Image.Image]:
        """Return the readable images by source, with the patches that the last layer keeps for `text`."""
        (readable,) = self._readable([list(found)])
        images = {each.source: decode_untrusted_image(each.image) for each in readable}
        if text is None or not images:
            return images
        inputs = self.processor(
            images=list(images.values()),
            text=[text] * len(images),
            return_tensors="pt",
        )
        selection = self.model.match(**inputs.to(self.model.device)).selection
        if not selection:
            return images
        sizes = [(image.height, image.width) for image in images.values()]
        boxes_per_image = self.processor.patch_boxes(selection[-1].kept_indices, sizes)
        drawn = {}
        for (source, image), boxes in zip(images.items(), boxes_per_image):
            drawn[source] = draw_kept_patches(image, boxes)
        return drawn


def _images_of(found: list[list[Found]]) -> dict[str, str | bytes]:
    """Return the images of results by source, each once."""
    return {each.source: each.image for found_by_query in found for each in found_by_query}
