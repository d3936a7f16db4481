"""
Search in two stages: features find the best `k` images of the table, and matching reranks them with patches that are
scored by the text.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lance
import numpy as np
import PIL.Image
import torch

from modeling_trips.inspection import draw_kept_patches
from trips_examples.data.faults import BadRowError
from trips_examples.data.images import decode_untrusted_image, inspect_image, path_or_bytes
from trips_examples.indexing.table import fingerprint_of, load_model, open_table
from trips_examples.metrics.retrieval import RetrievalEvaluator, TextIndex


logger = logging.getLogger(__name__)

REFINE = 10  # times k candidates of the index are compared by their exact vectors


@dataclass(frozen=True)
class Found:
    """
    A search result.

    Args:
        source (`str`): origin of the image.
        image (`str` or `bytes`, *optional*): path or encoded image; None if the table has neither.
        similarity (`float`): cosine similarity of the features of image and query.
        score (`float`, *optional*): score of matching: log-odds of a match plus similarity over temperature.
    """

    source: str
    image: str | bytes | None
    similarity: float
    score: float | None = None

    @property
    def description(self) -> str:
        score = "" if self.score is None else f"score {self.score:.2f}, "
        return f"{score}similarity {self.similarity:.3f}"


class Images(Sequence):
    """Images that are decoded on access."""

    def __init__(self, images: Sequence[str | bytes]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> PIL.Image.Image:
        return decode_untrusted_image(self.images[number])


class Finder:
    """
    Search in a table with the model that made it.

    Args:
        uri (`str`): location of the table.
        checkpoint (`str`), schedule (`str`, *optional*): as in `load_model`.
        device (`str`, *optional*, defaults to `"cpu"`)
        batch_size (`int`, *optional*, defaults to 32): number of images, texts or pairs per batch.

    Raises:
        OSError, ValueError: The table or checkpoint does not exist, or another model made the table.
    """

    def __init__(
        self, uri: str, checkpoint: str, schedule: str | None = None, device: str = "cpu", batch_size: int = 32
    ):
        self.model, self.processor = load_model(checkpoint, schedule, device=device)
        self.table: lance.LanceDataset = open_table(uri, fingerprint_of(self.model, self.processor))
        self.evaluator = RetrievalEvaluator(self.model, self.processor, batch_size=batch_size, progress=False)

    def describe_texts(self, texts: Sequence[str]) -> TextIndex:
        """Return the features of texts and the states for matching."""
        return self.evaluator.index_texts(texts)

    def describe_image(self, image: PIL.Image.Image) -> torch.Tensor:
        """Return the features of an image, `(1, projection_dim)`."""
        return self.evaluator.index_images([image])

    def nearest(self, features: torch.Tensor, k: int, exact: bool = False, probes: int = 20) -> list[list[Found]]:
        """
        Return for each query the `k` images of the highest cosine similarity, best first.

        Args:
            features (`torch.Tensor` of shape `(num_queries, projection_dim)`)
            k (`int`)
            exact (`bool`, *optional*, defaults to `False`): whether to compare all vectors, without the index.
            probes (`int`, *optional*, defaults to 20): number of partitions of the index to search.
        """
        how = {"column": "vector", "k": k, "metric": "cosine", "use_index": not exact}
        how |= {} if exact else {"nprobes": probes, "refine_factor": REFINE}
        found = []
        for query in features.float().numpy().astype(np.float32):
            columns = ["source", "image", "_distance"]
            rows = self.table.to_table(columns=columns, nearest={**how, "q": query}).to_pylist()
            found.append([Found(row["source"], path_or_bytes(row["image"]), 1 - row["_distance"]) for row in rows])
        return found

    def rerank(self, texts: TextIndex, found: list[list[Found]]) -> list[list[Found]]:
        """
        Rerank the results of each text by matching. The cached image states are shared among texts. Images that can no
        longer be read are left out with a warning.
        """
        readable = self._readable(found)
        kept = [[each for each in row if each.source in readable] for row in found]
        numbers = {source: number for number, source in enumerate(readable)}
        pairs = sorted((numbers[each.source], text) for text, row in enumerate(kept) for each in row)
        if not pairs:
            return kept
        scores = self.evaluator.match(Images(list(readable.values())), texts, torch.tensor(pairs))
        log_odds = dict(zip(pairs, scores.tolist()))
        temperature = self.model.temp().item()
        ranked = []
        for text, row in enumerate(kept):
            scored = [
                replace(each, score=log_odds[numbers[each.source], text] + each.similarity / temperature)
                for each in row
            ]
            ranked.append(sorted(scored, key=lambda each: each.score, reverse=True))
        return ranked

    def _readable(self, found: list[list[Found]]) -> dict[str, str | bytes]:
        images = {each.source: each.image for row in found for each in row}
        faults = {source: self._fault(image) for source, image in images.items()}
        for source, fault in faults.items():
            if fault is not None:
                logger.warning(f"Left out {source}: {fault}.")
        return {source: image for source, image in images.items() if faults[source] is None}

    def _fault(self, image: str | bytes | None) -> BadRowError | str | None:
        if image is None:
            return "the table does not hold it (--store_images)"
        inspected = inspect_image(image, "header", self.processor.patch_size)
        return inspected if isinstance(inspected, BadRowError) else None

    @torch.inference_mode()
    def draw(self, found: Sequence[Found], text: str | None = None) -> dict[str, list[tuple[str, PIL.Image.Image]]]:
        """
        Return titled images by source: each image that can be read, and its kept patches for a text in the last
        selection layer.
        """
        images = {source: decode_untrusted_image(image) for source, image in self._readable([list(found)]).items()}
        pictures = {source: [("image", image)] for source, image in images.items()}
        if text is None or not images:
            return pictures
        inputs = self.processor(images=list(images.values()), text=[text] * len(images), return_tensors="pt")
        selection = self.model.match(**inputs.to(self.model.device)).selection
        if selection:
            sizes = [(image.height, image.width) for image in images.values()]
            boxes = self.processor.patch_boxes(selection[-1].kept_indices, sizes)
            for (source, image), kept in zip(images.items(), boxes):
                pictures[source].append((f"{len(kept)} patches kept for the text", draw_kept_patches(image, kept)))
        return pictures
