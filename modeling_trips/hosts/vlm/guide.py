# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Learned guide that scores patches inside the vision tower of a frozen vision-language model by the prompt."""

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .families import find_family


class TextGuide(nn.Module, PyTorchModelHubMixin, library_name="trips-transformers"):
    """
    Turn the input embeddings of a prompt into the query of one selection layer of the vision tower.

    The guide is a learned mean of the embeddings and one linear layer. The language model and the tower do not change.
    `save_pretrained`, `from_pretrained` and `push_to_hub` read and write its own safetensors file.

    Args:
        text_hidden_size (`int`): Width of the language model's input embeddings.
        num_heads (`int`): Number of attention heads of the vision tower.
        head_dim (`int`): Width of one of these heads.
        layer (`int`, *optional*): Layer of the tower that the guide is trained for. By default it fits any layer.

    Example:

    ```python
    >>> from modeling_trips.hosts import TextGuide, apply_patch_selection

    >>> guide = TextGuide.for_model(model, layer=2)
    >>> apply_patch_selection(model, "2:text:0.11", guide=guide)
    ```
    """

    def __init__(self, text_hidden_size: int, num_heads: int, head_dim: int, layer: int | None = None):
        super().__init__()
        self.text_hidden_size = text_hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.layer = layer
        self.weight = nn.Linear(text_hidden_size, 1)
        self.query = nn.Linear(text_hidden_size, num_heads * head_dim)

    def forward(self, prompt: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            prompt (`torch.Tensor` of shape `(num_prompts, prompt_length, text_hidden_size)`): Input embeddings.
            prompt_mask (`torch.BoolTensor` of shape `(num_prompts, prompt_length)`): False marks ignored tokens.

        Returns:
            `torch.Tensor` of shape `(num_prompts, num_heads, head_dim)`, in the dtype of the guide.
        """
        prompt = prompt.to(self.query.weight.dtype)
        # Embeddings of language models have very different scales (Gemma multiplies them by the root of their width).
        prompt = nn.functional.normalize(prompt, dim=-1) * prompt.shape[-1] ** 0.5
        weights = self.weight(prompt).squeeze(-1).masked_fill(~prompt_mask, -torch.inf).softmax(dim=-1)
        weights = weights.nan_to_num(0.0)  # empty prompts
        mean = (weights.unsqueeze(1) @ prompt).squeeze(1)
        return self.query(mean).unflatten(-1, (self.num_heads, self.head_dim))

    @classmethod
    def for_model(cls, model: nn.Module, layer: int | None = None) -> "TextGuide":
        """
        Make a new guide with the widths of a vision-language model.

        Raises:
            TypeError: Selection inside the tower is not supported for the model.
        """
        family = find_family(model)
        if family is None or not family.layer_classes:
            raise TypeError(f"Selection inside the tower of {type(model).__name__} is not supported.")
        return cls(model.get_input_embeddings().embedding_dim, *family.heads, layer)
