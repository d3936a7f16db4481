"""`attn_implementation`: all kernels give the same outputs and kept patches, and each layer uses the kernel."""

from collections import Counter

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from tiny_models import CASES, each_model, kept_by, main_output
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from modeling_trips.modeling_trips_text import TripsTextSelfAttention
from modeling_trips.modeling_trips_vision import TripsVisionAttention


def attention_layers(model):
    return [module for module in model.modules() if isinstance(module, (TripsVisionAttention, TripsTextSelfAttention))]


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_compiles():
    torch._dynamo.reset()
    case = CASES[1]
    assert_equals_eager(case, case.make_inputs(), "flex_attention")


@pytest.fixture
def register():
    """Register an attention function and its mask function for a test."""
    names = []

    def register(name, attention_function, mask_function):
        AttentionInterface.register(name, attention_function)
        AttentionMaskInterface.register(name, mask_function)
        names.append(name)

    yield register
    for name in names:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


@each_model
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_a_registered_function_is_called_by_each_layer(case, training, register):
    calls = Counter()

    def attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs):
        calls[module] += 1
        assert query.shape[1] == module.config.num_attention_heads and query.shape[3] == module.head_dim
        assert scaling == module.head_dim**-0.5
        assert dropout == (0.25 if training else 0.0)
        if isinstance(module, TripsVisionAttention):
            assert (attention_mask is None) == (case.fusion_type != "single_stream")
        output = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
        return output.transpose(1, 2), None

    register("counted", attention, sdpa_mask)
    model = case.make_model("counted", dropout=0.25).train(training)
    model(**case.make_inputs(training=True))
    assert calls.keys() == set(attention_layers(model))
    if not case.draws:  # those that compare more than one pair per text pass some layers again
        assert set(calls.values()) == {1}


def flash(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False):
    """`flash_attn_func` in PyTorch: `(batch_size, seq_length, num_heads, head_dim)`, causal up to the last key."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    visible = visible.tril(key.shape[2] - query.shape[2]) if causal else visible
    output = scaled_dot_product_attention(query, key, value, visible, dropout_p, scale=softmax_scale)
    return output.transpose(1, 2)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """`flash_attn_varlen_func` in PyTorch: sequences without padding, one after the other."""
    outputs = []
    for row in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]]
        keys, values = (states[cu_seqlens_k[row] : cu_seqlens_k[row + 1]] for states in (k, v))
        outputs.append(flash(queries[None], keys[None], values[None], dropout_p, softmax_scale, causal)[0])
    return torch.cat(outputs)


@pytest.fixture
def flash_in_torch(register, monkeypatch):
    """Run Transformers' flash attention, with masks and unpadding, on PyTorch in place of the CUDA kernels."""
    functions = (flash, flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    register("flash_in_torch", flash_attention_forward, flash_attention_mask)
    return "flash_in_torch"


def assert_equals_eager(case, inputs, attn_implementation):
    outputs, expected = (case.make_model(name)(**inputs) for name in (attn_implementation, "eager"))
    assert kept_by(outputs) == kept_by(expected)
    rows = ...
    if attn_implementation == "flash_in_torch" and "last_hidden_state" in outputs:
        rows = inputs["attention_mask"].bool()  # states of padding differ
    torch.testing.assert_close(main_output(outputs)[rows], main_output(expected)[rows], rtol=1e-4, atol=2e-5)


@each_model
@pytest.mark.parametrize(
    "attn_implementation, padded",
    [("sdpa", True), ("flex_attention", True), ("flash_in_torch", True), ("flash_in_torch", False)],
)
@torch.no_grad()
def test_every_kernel_gives_the_outputs_of_eager_attention(case, attn_implementation, padded, flash_in_torch):
    inputs = case.make_inputs()
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.compiler.set_stance("force_eager"):
        assert_equals_eager(case, inputs, attn_implementation)
