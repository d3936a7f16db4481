"""Learned guide that scores patches inside the vision tower of a frozen vision-language model by the prompt."""

from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors import safe_open
from torch import nn

from .families import find_family


CARD = """---
{{ card_data }}
---

# Text guide

The prompt scores the patches inside the vision tower of a frozen vision-language model: text-relevant image patch
selection (TRIPS, [arXiv 2403.07883](https://arxiv.org/abs/2403.07883)). This repository holds the guide only.

- layer of the tower: {{ guide.layer or "any" }}
{% for name, value in training.items() -%}
- {{ name }}: {{ value }}
{% endfor %}
```python
from modeling_trips.hosts import TextGuide, apply_patch_selection

guide = TextGuide.from_pretrained("this repository")
apply_patch_selection(model, "{{ guide.layer or 2 }}:text:{{ training.get("keep rate", 0.25) }}", guide=guide)
```
"""

_DOWNLOADING = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class TextGuide(nn.Module, PyTorchModelHubMixin, library_name="trips-transformers", model_card_template=CARD):
    """
    Turn the input embeddings of a prompt into the query of one selection layer of the vision tower.

    The guide is a learned mean of the embeddings and one linear layer. The language model and the tower do not change.
    `save_pretrained`, `from_pretrained` and `push_to_hub` read and write its own safetensors file. `from_pretrained`
    refuses a file whose weights are missing, renamed, of another size, or not finite.

    Args:
        text_hidden_size (`int`): Width of the language model's input embeddings.
        num_heads (`int`): Number of attention heads of the vision tower.
        head_dim (`int`): Width of one of these heads.
        layer (`int`, *optional*): Layer of the tower that the guide is trained for. By default it fits any layer.
        trained_with (`dict`, *optional*): Facts about the training for the model card, such as the base model.

    Example:

    ```python
    >>> from modeling_trips.hosts import TextGuide, apply_patch_selection

    >>> guide = TextGuide.for_model(model, layer=2)
    >>> apply_patch_selection(model, "2:text:0.11", guide=guide)
    ```
    """

    def __init__(
        self,
        text_hidden_size: int,
        num_heads: int,
        head_dim: int,
        layer: int | None = None,
        trained_with: dict | None = None,
    ):
        super().__init__()
        self.text_hidden_size = text_hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.layer = layer
        self.trained_with = trained_with
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
        scale = self.text_hidden_size**0.5
        prompt = nn.functional.normalize(prompt, dim=-1) * scale
        logits = self.weight(prompt).squeeze(-1)  # (num_prompts, prompt_length)
        logits = logits.masked_fill(~prompt_mask, -torch.inf)
        weights = logits.softmax(dim=-1)
        weights = weights.nan_to_num(0.0)  # NaN in empty prompts
        mean = weights.unsqueeze(1) @ prompt  # (num_prompts, 1, text_hidden_size)
        query = self.query(mean.squeeze(1))  # (num_prompts, num_heads * head_dim)
        return query.unflatten(-1, (self.num_heads, self.head_dim))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **options) -> "TextGuide":
        downloading = {name: options.pop(name) for name in _DOWNLOADING}
        file = Path(model_id) / SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            file = hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **downloading)
        with torch.device("meta"):  # before memory is taken
            guide = cls(**options)
        expected = {name: list(weight.shape) for name, weight in guide.state_dict().items()}
        with safe_open(file, framework="pt", device=map_location) as weights:
            found = {name: weights.get_slice(name).get_shape() for name in weights.keys()}
            if found != expected:
                raise ValueError(f"The guide {model_id} must have the weights {expected}, got {found}.")
            state = {name: weights.get_tensor(name).float() for name in expected}
        if wrong := [name for name, weight in state.items() if not weight.isfinite().all()]:
            raise ValueError(
                f"The guide {model_id} has values that are not finite in {', '.join(wrong)}. Train it again."
            )
        guide.load_state_dict(state, assign=True)
        return guide.eval()

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        training = self.trained_with or {}
        card = super().generate_model_card(*args, guide=self, training=training, **kwargs)
        card.data["base_model"] = training.get("base model")
        return card

    @classmethod
    def for_model(cls, model: nn.Module, layer: int | None = None, trained_with: dict | None = None) -> "TextGuide":
        """
        Make a new guide with the widths of a vision-language model.

        Raises:
            TypeError: Selection inside the tower is not supported for the model.
        """
        family = find_family(model)
        if family is None or not family.layer_classes:
            raise TypeError(f"Selection inside the tower of {type(model).__name__} is not supported.")
        num_heads, head_dim = family.heads
        return cls(
            text_hidden_size=model.get_input_embeddings().embedding_dim,
            num_heads=num_heads,
            head_dim=head_dim,
            layer=layer,
            trained_with=trained_with,
        )
