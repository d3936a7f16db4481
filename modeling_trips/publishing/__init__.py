"""Hub repository and model card of a checkpoint."""

from .model_card import CardArguments, make_model_card
from .repository import build_repository, publish


__all__ = ["CardArguments", "build_repository", "make_model_card", "publish"]
