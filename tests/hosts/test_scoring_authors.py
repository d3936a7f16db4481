"""
Scorers against the functions of the papers' authors, on random tokens in float64.

Their code is not in this repository (that of DivPrune may not be used commercially). To compare, clone
`vbdi/divprune`, `Theia-4869/CDPruner` and `Theia-4869/VisPruner` into one folder, and name it:

    AUTHORS_CODE=../authors python -m pytest -n 0 tests/hosts/test_scoring_authors.py
"""

import ast
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_trips.hosts.vlm.scoring import select_by_cdpruner, select_by_divprune, select_by_vispruner


FOLDER = os.environ.get("AUTHORS_CODE")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="AUTHORS_CODE names no folder with clones")
SIZES = [(576, 64), (256, 32), (64, 7)]  # tokens, and kept ones
KINDS = ("independent", "with a shared part", "clusters", "of different lengths")


def load_functions(file: str, *names: str) -> list:
    """Return functions or methods of a file of the authors, in float64, without importing it."""
    text = Path(FOLDER, file).read_text("utf-8").replace(".float()", ".double()")
    scope: dict = {"torch": torch}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name in names and node.name not in scope:
            exec(textwrap.dedent(ast.get_source_segment(text, node, padded=True)), scope)
    return [scope[name] for name in names]


def make_tokens(kind: str, num_tokens: int, seed: int, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = normal(1, num_tokens, width)
    if kind == "with a shared part":
        tokens += 3 * normal(1, 1, width)
    elif kind == "clusters":
        tokens = 0.3 * tokens + normal(1, 12, width)[:, torch.randint(0, 12, (num_tokens,), generator=generator)]
    elif kind == "of different lengths":
        tokens *= normal(1, num_tokens, 1).exp()
    return tokens


@pytest.fixture(autouse=True)
def in_float64():
    """Let the tensors that their functions make be of float64: rounding would decide between nearly equal tokens."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens, num_kept", SIZES)
def test_divprune_keeps_the_tokens_of_the_authors(kind, num_tokens, num_kept):
    divprune, cosines = load_functions(
        "divprune/LLaVA/llava/model/llava_arch.py", "DivPrune", "pairwise_cosine_similarity"
    )
    model = SimpleNamespace(pairwise_cosine_similarity=lambda tokens: cosines(None, tokens))
    for seed in range(3):
        tokens = make_tokens(kind, num_tokens, seed)
        theirs, _ = divprune(model, tokens[0], num_tokens, threshold_ratio=num_kept / num_tokens)
        ours, _ = select_by_divprune(tokens, None, None, num_kept)
        assert torch.equal(ours[0], theirs.sort().values)


def make_cdpruner(tokens: torch.Tensor, text: torch.Tensor, num_kept: int) -> SimpleNamespace:
    """Return what the method of the authors' model uses of its `self`."""

    def vision_tower(images, texts):
        return tokens, tokens, text

    model = SimpleNamespace(get_vision_tower=lambda: vision_tower, mm_projector=lambda features: features)
    return SimpleNamespace(get_model=lambda: model, visual_token_num=num_kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens, num_kept", SIZES)
def test_cdpruner_keeps_the_tokens_of_the_authors(kind, num_tokens, num_kept):
    """With the prompt in place of CLIP's text, whose relevance the authors take with the opposite sign."""
    (encode_images,) = load_functions("CDPruner/llava/model/llava_arch.py", "encode_images")
    for seed in range(3):
        tokens = make_tokens(kind, num_tokens, seed)
        words = make_tokens("independent", 5, seed + 99)
        theirs = encode_images(make_cdpruner(tokens, -words[0], num_kept), None)[1]
        ours, _ = select_by_cdpruner(tokens, words, torch.ones(1, 5, dtype=torch.bool), num_kept)
        assert torch.equal(ours[0], theirs[0].nonzero()[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens, num_kept", SIZES[:2])
def test_vispruner_keeps_the_tokens_of_the_authors(kind, num_tokens, num_kept):
    """With a connector that changes nothing; their code fails for odd numbers of tokens."""
    (encode_images,) = load_functions("VisPruner/llava/model/llava_arch.py", "encode_images")
    for seed in range(3):
        tokens = make_tokens(kind, num_tokens, seed)
        attention = make_tokens("independent", num_tokens, seed + 99, width=4).softmax(dim=1).transpose(1, 2)
        model = make_vispruner(tokens, attention, num_kept)
        theirs = encode_images(model, None)[1]
        ours, _ = select_by_vispruner(tokens, None, None, num_kept, attention=attention.mean(dim=1))
        assert torch.equal(ours[0], theirs[0].nonzero()[:, 0])


def make_vispruner(tokens: torch.Tensor, attention: torch.Tensor, num_kept: int) -> SimpleNamespace:
    """Return what the method of the authors' model uses of its `self`; heads have `attention`."""

    def vision_tower(images, output_attentions):
        return tokens, attention

    model = SimpleNamespace(get_vision_tower=lambda: vision_tower, mm_projector=lambda features: features)
    return SimpleNamespace(
        get_model=lambda: model, get_visual_token_num=lambda: num_kept, get_important_ratio=lambda: 0.5
    )
