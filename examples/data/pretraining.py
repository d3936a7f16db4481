"""Batches of pre-training: captions with masked words, and captions cut in two."""

import hashlib
from dataclasses import dataclass

import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling

from trips_examples.data.collators import RetrievalCollator


@dataclass
class PretrainingCollator(RetrievalCollator):
    """
    Collator from rows with `image`, `image_id` and `caption` to inputs of [`TripsForPreTraining`].

    `seed` and the batch's rows determine masked words and cuts, independently of resuming and of the number of
    workers.

    Args:
        mlm_probability (`float`, *optional*, defaults to 0.15): share of masked words. 80% of them become [MASK], 10%
            another word, and 10% stay.
        masks_words, cuts_captions (`bool`, *optional*, defaults to `True`): whether to add inputs of masked language
            modeling, and of prefix language modeling.
        seed (`int`, *optional*, defaults to 0)
    """

    mlm_probability: float = 0.15
    masks_words: bool = True
    cuts_captions: bool = True
    seed: int = 0

    def __post_init__(self):
        self.masker = None
        if self.masks_words:
            self.masker = DataCollatorForLanguageModeling(self.processor.tokenizer, True, False, self.mlm_probability)

    def __call__(self, rows: list[dict]) -> dict:
        rows_and_seed = "\n".join([str(self.seed), *(f"{row['source']}\t{row['caption']}" for row in rows)])
        digest = hashlib.blake2b(rows_and_seed.encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
            return super().__call__(rows)

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        inputs = super().encode(images, image_index, rows)
        if self.masks_words:
            inputs.update(self.masked_words(inputs["input_ids"]))
        if self.cuts_captions:
            inputs.update(self.cut_captions(inputs["input_ids"]))
        return inputs

    def masked_words(self, input_ids: torch.LongTensor) -> dict[str, torch.LongTensor]:
        """Mask words of `(num_texts, text_length)`. The labels are the masked tokens, and -100 elsewhere."""
        tokenizer = self.processor.tokenizer
        special = torch.isin(input_ids, torch.tensor(tokenizer.all_special_ids))
        masked, labels = self.masker.torch_mask_tokens(input_ids.clone(), special_tokens_mask=special)
        return {"mlm_input_ids": masked, "mlm_labels": labels}

    def cut_captions(self, input_ids: torch.LongTensor) -> dict[str, torch.LongTensor]:
        """
        Cut captions, `(num_texts, text_length)`, at random between two words. The beginnings have the special tokens
        of a prompt; the continuations end with [SEP]. A caption of one word is not cut, and its labels are all -100.
        """
        tokenizer = self.processor.tokenizer
        ends = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        beginnings, continuations = [], []
        for ids, draw in zip(input_ids.tolist(), torch.rand(len(input_ids)).tolist()):
            places = [place for place, token in enumerate(ids) if token not in ends]
            cut = 1 + int(draw * (len(places) - 1))  # 1 to len(places) - 1
            later = set(places[cut:])
            beginnings.append([t for place, t in enumerate(ids) if place not in later and t != tokenizer.pad_token_id])
            rest = [ids[place] for place in places[cut:]]
            continuations.append([*rest, tokenizer.sep_token_id] if rest else [-100])
        prompts = _padded(beginnings, tokenizer.pad_token_id)
        lengths = torch.tensor([len(beginning) for beginning in beginnings])
        return {
            "prompt_input_ids": prompts,
            "prompt_attention_mask": (torch.arange(prompts.shape[1]) < lengths[:, None]).long(),
            "labels": _padded(continuations, -100),
        }


def _padded(rows: list[list[int]], value: int) -> torch.LongTensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
