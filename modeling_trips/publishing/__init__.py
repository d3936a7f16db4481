"""Hub repository and model card of a checkpoint."""

from .model_card import make_model_card
from .repository import build_repository, publish


__all__ = ["build_repository", "make_model_card", "publish"]
