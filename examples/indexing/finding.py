"""
Search in two stages: features find the best `k` images of the table, and matching ranks these anew, where the text
chooses the patches of each.
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


@dataclass(frozen=True)
class Found:
    """
    An image that a query found.

    Args:
        source (`str`): its place.
        image (`str` or `bytes`, *optional*): its path, or itself encoded; None if neither is in the table.
        similarity (`float`): of its features to the query's.
        score (`float`, *optional*): after matching: log-odds of a match plus similarity over temperature.
    """

    source: str
    image: str | bytes | None
    similarity: float
    score: float | None = None

    @property
    def told(self) -> str:
        score = "" if self.score is None else f"score {self.score:.2f}, "
        return f"{score}similarity {self.similarity:.3f}"


class Images(Sequence):
    """Images that are decoded when they are asked for."""

    def __init__(self, images: Sequence[str | bytes]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> PIL.Image.Image:
        return decode_untrusted_image(self.images[number])


class Finder:
    """
    A table, and the model that made it.

    Args:
        uri (`str`): of the table.
        checkpoint (`str`), schedule (`str`, *optional*): as in `load_model`.
        device (`str`, *optional*, defaults to `"cpu"`)
        batch_size (`int`, *optional*, defaults to 32): images, texts and pairs that are computed at a time.

    Raises:
        OSError, ValueError: if there is no such table or checkpoint, or another model made the table.
    """

    def __init__(
        self, uri: str, checkpoint: str, schedule: str | None = None, device: str = "cpu", batch_size: int = 32
    ):
        self.model, self.processor = load_model(checkpoint, schedule, device=device)
        self.table: lance.LanceDataset = open_table(uri, fingerprint_of(self.model, self.processor))
        self.evaluator = RetrievalEvaluator(self.model, self.processor, batch_size=batch_size, progress=False)

    def describe_texts(self, texts: Sequence[str]) -> TextIndex:
        """Features of texts, and the states that matching needs."""
        return self.evaluator.index_texts(texts)

    def describe_image(self, image: PIL.Image.Image) -> torch.Tensor:
        """Features of an image: `(1, projection_dim)`."""
        return self.evaluator.index_images([image])

    def nearest(
        self, features: torch.Tensor, k: int, exact: bool = False, probes: int = 20, refine: int = 10
    ) -> list[list[Found]]:
        """
        For each query the `k` images of the highest cosine similarity, the best first.

        Args:
            features (`torch.Tensor` of shape `(num_queries, projection_dim)`)
            k (`int`)
            exact (`bool`, *optional*, defaults to `False`): whether to compare all vectors, without the index.
            probes (`int`, *optional*, defaults to 20): partitions of the index that are looked into.
            refine (`int`, *optional*, defaults to 10): so many times `k` candidates are compared by their vectors.
        """
        how = {"column": "vector", "k": k, "metric": "cosine", "use_index": not exact}
        how |= {} if exact else {"nprobes": probes, "refine_factor": refine}
        found = []
        for query in features.float().numpy().astype(np.float32):
            columns = ["source", "image", "_distance"]
            rows = self.table.to_table(columns=columns, nearest={**how, "q": query}).to_pylist()
            found.append([Found(row["source"], path_or_bytes(row["image"]), 1 - row["_distance"]) for row in rows])
        return found

    def rerank(self, texts: TextIndex, found: list[list[Found]]) -> list[list[Found]]:
        """
        What each text found, in the order of matching. What images share among texts is computed once. Images that
        cannot be read any more are left out, and named in a warning.
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
        Titled pictures by source, of images that can be read: each as it is, and the patches that a text keeps of it
        in the last layer that selects.
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
                pictures[source].append((f"{len(kept)} patches that the text kept", draw_kept_patches(image, kept)))
        return pictures
