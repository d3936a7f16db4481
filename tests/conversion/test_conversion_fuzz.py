"""
Randomly damaged files convert into working models or raise an error of this project.

FUZZ_EXAMPLES=20000 sets the number of examples.
"""

import io
import os

import pytest
import torch
from albef_reference import TINY, random_checkpoint
from convert_cases import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from modeling_trips.conversion.published import convert_published
from modeling_trips.conversion.rules import ConversionError


TOKENIZER = make_tokenizer()
SIZES = TINY._replace(
    width=8,
    intermediate=8,
    patch_size=2,
    grid=2,
    vocab=len(TOKENIZER),
    projection=4,
    num_vision_layers=2,
    num_text_layers=2,
    first_fusion_layer=1,
    num_decoder_layers=1,
)
OPTIONS = {"num_attention_heads": SIZES.num_heads, "depths": (2, 1, 1, 1), "selection_layers": [1]}
TASKS = ("question-answering", "retrieval", "pretraining")
torch.manual_seed(0)
CHECKPOINTS = {task: random_checkpoint(task, SIZES) for task in TASKS}
LAYERS = ("visual_encoder.blocks.1.", "text_encoder.encoder.layer.1.", "text_decoder.", "text_encoder.", "itm_head.")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


def pytorch_bytes(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    TOKENIZER.save_pretrained(folder / "bert")
    return folder


@torch.no_grad()
def assert_converts_or_raises(folder, content: bytes, options: dict):
    path = folder / "file.pth"
    path.write_bytes(content)
    try:
        model, processor, report = convert_published(path, tokenizer=str(folder / "bert"), **options)
    except ConversionError as error:
        assert "file.pth" in str(error)
        assert str(error).replace("\n", "").isprintable()
        return
    assert str(report).replace("\n", "").isprintable()
    size = model.config.vision_config.image_size
    inputs = processor(text=["a red circle", "yes"], return_tensors="pt")
    states = model.eval().model(**inputs, pixel_values=torch.randn(2, 3, size, size)).last_hidden_state
    assert states.isfinite().all()


# State dicts

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 16, 24]), max_size=4)
DTYPES = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool]
    + [torch.int8, torch.int64, torch.uint8]
)
TENSORS = st.one_of(
    st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), SHAPES, DTYPES),
    st.builds(lambda shape: torch.nn.Parameter(torch.randn(shape)), SHAPES),
    st.builds(lambda shape: torch.randn(()).expand(shape), SHAPES),
    st.sampled_from(
        [
            torch.eye(8).to_sparse(),
            torch.eye(8).to_sparse_csr(),
            torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.quint8),
            torch.empty(8, 8, device="meta"),
            torch.zeros(1).expand(10**9, 10**9),
            torch.ones(8, 8, dtype=torch.complex64).conj(),
        ]
    ),
)
OTHERS = st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers(), max_size=2), st.just({"a": 1}))
CHANGES = st.sampled_from(
    [
        lambda weight: weight.half(),
        lambda weight: weight.double(),
        lambda weight: weight.transpose(0, -1) if weight.ndim else weight,
        lambda weight: weight.flatten(),
        lambda weight: weight[None],
        lambda weight: torch.cat([weight[None]] * 2).flatten(0, 1) if weight.ndim else weight,
        lambda weight: weight * float("nan"),
        lambda weight: weight * 1e30,
        lambda weight: weight.clone().fill_(-float("inf")),
        lambda weight: weight[..., :-1] if weight.ndim else weight,
    ]
)
NAMES = st.one_of(
    st.text(max_size=12),
    st.integers(0, 3),
    st.builds("{}{}{}".format, st.sampled_from(LAYERS), st.text("0123456789.", max_size=12), st.text(max_size=4)),
)


@st.composite
def state_dicts(draw):
    source = dict(draw(st.sampled_from([*CHECKPOINTS.values()])))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(source, key=str)))
        kind = draw(st.sampled_from(["lose", "replace", "other", "change", "rename", "add", "lose a part"]))
        if kind == "replace":
            source[key] = draw(TENSORS)
        elif kind == "other":
            source[key] = draw(OTHERS)
        elif kind == "change" and isinstance(source[key], torch.Tensor) and source[key].layout == torch.strided:
            change = draw(CHANGES)
            source[key] = change(source[key].detach().float()) if source[key].numel() < 10**6 else source[key]
        elif kind == "rename":
            source[draw(NAMES)] = source.pop(key)
        elif kind == "add":
            source[draw(NAMES)] = draw(TENSORS)
        elif kind == "lose a part":
            part = draw(st.sampled_from(LAYERS))
            source = {name: value for name, value in source.items() if not str(name).startswith(part)} or source
        elif kind == "lose" and len(source) > 1:
            del source[key]
    return source


ODD_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "task": st.sampled_from([*TASKS, "nonsense"]),
        "num_attention_heads": st.sampled_from([None, -1, 0, 1, 3, 8]),
        "depths": st.sampled_from([(12, 6, 6, 6), (0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 2, 1), (2, 1, 1, 10**8)]),
        "image_size": st.sampled_from([1, 2, 3, 4, 8]),
        "keep_rate": st.sampled_from([0.0, 0.5, 1.0, 7.0, [0.5, 0.5]]),
        "selection_layers": st.sampled_from([[], [2], [1, 2], [2, 1], [5, 10]]),
        "selection_guidance": st.sampled_from(["text", "image", "random", "nonsense"]),
    },
)


@FUZZ
@given(source=state_dicts(), options=ODD_OPTIONS, save=st.sampled_from([pytorch_bytes, lambda x: pytorch_bytes([x])]))
def test_damaged_state_dicts_convert_or_raise(folder, source, options, save):
    assert_converts_or_raises(folder, save({"model": source}), OPTIONS | options)


# Bytes

FILES = {
    "zip": pytorch_bytes({"model": CHECKPOINTS["retrieval"]}),
    "legacy": pytorch_bytes({"model": CHECKPOINTS["retrieval"]}, _use_new_zipfile_serialization=False),
    "safetensors": safetensors_bytes({key: value.clone() for key, value in CHECKPOINTS["retrieval"].items()}),
}


@st.composite
def damaged_files(draw):
    content = bytearray(FILES[draw(st.sampled_from([*FILES]))])
    # Metadata is at the start and the end of a file; the rest is weights.
    places = st.one_of(
        st.integers(0, len(content) - 1),
        st.integers(0, 400),
        st.integers(len(content) - 4000, len(content) - 1),
    )
    for _ in range(draw(st.integers(1, 6))):
        place = min(draw(places), len(content))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "drop", "copy"]))
        if kind == "flip" and place < len(content):
            content[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        elif kind == "drop":
            del content[place : place + draw(st.integers(1, 100))]
        elif kind == "copy":
            content[place:place] = content[place : place + draw(st.integers(1, 100))]
    return bytes(content)


@FUZZ
@given(content=damaged_files())
def test_damaged_bytes_convert_or_raise(folder, content):
    assert_converts_or_raises(folder, content, OPTIONS)


def test_intact_file_converts(folder):
    for content in FILES.values():
        (folder / "whole.pth").write_bytes(content)
        model, _, _ = convert_published(folder / "whole.pth", tokenizer=str(folder / "bert"), **OPTIONS)
        assert type(model).__name__ == "TripsForRetrieval"
