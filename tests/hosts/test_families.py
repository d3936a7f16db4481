"""Every class of `AutoModelForImageTextToText`: right on a tiny model, or refused with a reason."""

import copy
import inspect

import pytest
import torch
from by_hand import logits_of_even
from tiny_classes import IMAGE, IN_TOWER, PAGE, REFUSED, RUNS, make, make_refused, reason_of, with_table
from tiny_vlms import keep_even
from torch.testing import assert_close
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from modeling_trips.hosts import apply_patch_selection, prune_inputs, remove_patch_selection
from modeling_trips.hosts.vlm.families import find_family
from modeling_trips.patch_selection import num_kept_tokens


COUNTS = [1, 2]  # images per prompt
SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def padding_of(model):
    """Return the token that pads prompts of a model that selects. Padding changes how experts round other tokens."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if padding in (None, IMAGE) else padding


def make_prompts(sizes, padding, frame=()):
    """Return left-padded prompts with images of these numbers of visual tokens, in frames of these tokens."""
    generator = torch.Generator().manual_seed(1)

    def words(number):
        return torch.randint(5, 80, (number,), generator=generator).tolist()

    rows = []
    remaining = list(sizes)
    for row, count in enumerate(COUNTS):
        ids = words(3)
        for _ in range(count):
            ids += [*frame[:1], *[IMAGE] * remaining.pop(0), *frame[1:], *words(2)]
        rows.append(ids + words(4 + row))
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def with_types(model, inputs):
    """Add the types of tokens, where the model takes them."""
    types = (inputs["input_ids"] == IMAGE).long()
    parameters = inspect.signature(model.forward).parameters
    return {**inputs, **{name: types for name in ("mm_token_type_ids", "token_type_ids") if name in parameters}}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if row.quick else pytest.mark.slow)
        for name, row in RUNS.items()
        if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ],
)
@torch.no_grad()
def test_a_class_that_runs(name):
    row = RUNS[name]
    model = make(name, row.config)
    own_class = type(model)
    family = find_family(model)
    assert bool(family.layer_classes) == (name in IN_TOWER)
    images = row.images(0, sum(COUNTS))
    sizes = [len(group) for group in family.groups(model.base_model.get_image_features(**images, return_dict=True))]
    inputs = with_types(model, make_prompts(sizes, padding_of(model), row.frame)) | images
    mask = inputs["attention_mask"].bool()

    def logits(values=inputs):
        return model(**copy.deepcopy(values)).logits

    def generate(**options):
        suppressed = [IMAGE, *row.frame]
        return model.generate(**copy.deepcopy(inputs), **SETTINGS, suppress_tokens=suppressed, **options)

    unpruned = logits()
    sequences = generate()
    apply_patch_selection(model, keep_rate=1.0)
    assert torch.equal(logits()[mask], unpruned[mask])
    assert torch.equal(generate(), sequences)

    apply_patch_selection(model, keep_rate=0.25)
    kept = [num_kept_tokens(size, 0.25) for size in sizes]
    pruned = prune_inputs(model, copy.deepcopy(inputs), keep_rate=0.25)
    expected = [kept[0], sum(kept[1:])]
    assert (pruned["input_ids"] == IMAGE).sum(dim=1).tolist() == expected
    num_text = (mask & (inputs["input_ids"] != IMAGE)).sum(dim=1)
    together = logits()
    assert together.shape[1] == max(num_text + torch.tensor(expected))
    assert torch.equal(generate(), generate(use_cache=False))
    first = 0
    for prompt, count in enumerate(COUNTS):
        own = {name: inputs[name][prompt : prompt + 1, mask[prompt]] for name in inputs.keys() - images.keys()}
        alone = logits({**own, **row.images(first, first + count)})[0]
        scale = float(alone.abs().max())
        assert_close(together[prompt, -len(alone) :], alone, atol=row.tolerance * scale, rtol=0)
        first += count

    remove_patch_selection(model)
    assert type(model) is own_class
    assert torch.equal(logits(), unpruned)
    if row.by_hand:
        own = {name: inputs[name][:1, mask[0]] for name in inputs.keys() - images.keys()}
        own |= row.images(0, 1)
        output = model.base_model.get_image_features(**row.images(0, 1), return_dict=True)
        by_hand = logits_of_even(model, own, output, family.groups(output))
        apply_patch_selection(model, keep_rate=0.5, scorer=keep_even)
        assert_close(logits(own), by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES])
def test_a_class_that_is_refused(name):
    with pytest.raises((TypeError, ValueError)) as raised:
        apply_patch_selection(make_refused(name), keep_rate=0.25)
    assert reason_of(name).partition(";")[0] in str(raised.value) or name == "blip"


@pytest.mark.release
def test_every_class_has_a_row():
    """A class that a new Transformers brings needs a row in tests/helpers/tiny_classes.py."""
    assert {*RUNS, *REFUSED} >= {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert not RUNS.keys() & REFUSED.keys()


def test_the_page_has_the_table():
    page = PAGE.read_text("utf-8")
    assert with_table(page) == page, "Run `python tests/helpers/tiny_classes.py`."


def test_a_configuration_without_a_placeholder_is_refused():
    model = make("minicpmv4_6", {**RUNS["minicpmv4_6"].config, "image_token_id": None})
    with pytest.raises(TypeError, match="image_token_id"):
        apply_patch_selection(model, keep_rate=0.25)
