# Copyright 2026 The TRIPS for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Patch selection in generative vision-language models, inside the vision tower and after it."""

from .guide import TextGuide as TextGuide
from .pruning import prune_inputs as prune_inputs
