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
"""What the losses of several processes know of each other. One process alone communicates nothing."""

import torch
from torch import distributed


def num_processes() -> int:
    """How many processes train together; 1 if `torch.distributed` is not in use."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def distinct_image_ids(num_images: int, device: torch.device) -> torch.LongTensor:
    """
    Image ids for a batch in which no image is twice, in this process or in another.

    Returns:
        `torch.LongTensor` of shape `(num_images,)`.
    """
    rank = distributed.get_rank() if num_processes() > 1 else 0
    return torch.arange(num_images, device=device) * num_processes() + rank


def mean_count(count: torch.Tensor) -> torch.Tensor:
    """
    The mean of a number of items (shape `()`) over the processes, at least one item in all of them.

    A process that divides the sum over its items by it has a loss whose mean over the processes, as data parallel
    training takes it, is the mean over all items, also if one process has more of them than another.
    """
    if num_processes() == 1:
        return count.clamp_min(1)
    total = count.clone()
    distributed.all_reduce(total)
    return total.clamp_min(1) / num_processes()


def row_counts(*tensors: torch.Tensor) -> list[list[int]]:
    """For each of the tensors how many rows the processes have, in the order of their ranks. The host waits for it."""
    counts = [len(tensor) for tensor in tensors]
    if num_processes() == 1:
        return [[count] for count in counts]
    return torch.stack(_gather(torch.tensor(counts, device=tensors[0].device)), dim=1).tolist()


def gather_with_gradient(tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """
    The rows of all processes, in the order of their ranks; with one process, `tensor` itself. Each process gets the
    gradient that its rows have in the losses of all.

    Args:
        tensor (`torch.Tensor` of shape `(num_rows, ...)`)
        counts (`list[int]`): the number of rows of each process, see `row_counts`.

    Returns:
        `torch.Tensor` of shape `(sum(counts), ...)`.
    """
    return _GatherWithGradient.apply(tensor, counts) if num_processes() > 1 else tensor


class _GatherWithGradient(torch.autograd.Function):
    """`torch.distributed.nn` has one too, but deprecated, and its successor is private."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        padding = tensor.new_empty(max(counts) - len(tensor), *tensor.shape[1:])
        gathered = _gather(torch.cat((tensor, padding)))
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # reduced in place, and not ours
        distributed.all_reduce(gradient)
        return gradient.split(ctx.counts)[distributed.get_rank()], None


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes, of one shape."""
    gathered = [torch.empty_like(tensor) for _ in range(num_processes())]
    distributed.all_gather(gathered, tensor)
    return gathered
