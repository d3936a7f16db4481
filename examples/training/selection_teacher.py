"""A teacher for the choice of patches: an unpruned model, and where it looks."""

import torch

from modeling_trips import TripsModel
from trips_examples.data.task_collators import a_text_per_image


class SelectionTeacher:
    """
    An unpruned model whose attention says which patches a text needs, where the data do not: of the text's [CLS] to
    the patches, the mean over heads and layers of the fusion encoder. It takes part in training alone, at the price of
    a forward pass per step.

    Args:
        name_or_path (`str`): a TRIPS checkpoint of any task, which is run at a keep rate of 1.0.
        device (`torch.device`, *optional*, defaults to the CPU)

    Raises:
        `ValueError`: if the checkpoint is a single stream, which has no fusion encoder that could look.
    """

    def __init__(self, name_or_path: str, device: torch.device | str = "cpu"):
        # Attention maps are what is asked for: no kernel but the eager one gives them.
        self.model = TripsModel.from_pretrained(name_or_path, attn_implementation="eager", keep_rate=1.0).to(device)
        if self.model.fusion_model is None:
            raise ValueError(f"--selection_teacher {name_or_path}: a single stream has no fusion encoder to ask.")
        self.model.requires_grad_(False)

    @torch.no_grad()
    def patch_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Where the teacher looks.

        Args:
            inputs (`dict`): those of any head: `pixel_values`, `input_ids`, and what goes with them.

        Returns:
            `torch.Tensor` of shape `(num_texts, num_patches)`, float32, each row of sum 1. Of a text with several
            images there is a row for each.
        """
        outputs = self.model(**a_text_per_image(inputs), output_attentions=True)
        attention = torch.stack([layer[:, :, 0].float().mean(dim=1) for layer in outputs.cross_attentions]).mean(dim=0)
        to_patches = attention[:, 1:]
        return to_patches / to_patches.sum(dim=-1, keepdim=True)
