"""Without a GPU or vLLM the measurements say what to type. With vLLM they run on a CPU with tiny shapes."""

import importlib.util

import on_a_gpu
import pytest


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_type():
    with pytest.raises(ValueError, match="pip install"):
        on_a_gpu.main(["--device=cpu", "--tiny=True"])


def test_without_a_gpu_it_says_what_to_type():
    if on_a_gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--device cpu"):
        on_a_gpu.main([])
