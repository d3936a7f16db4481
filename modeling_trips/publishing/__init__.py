"""What goes with a checkpoint to the Hub: its model card."""

from .model_card import CardArguments, make_model_card


__all__ = ["CardArguments", "make_model_card"]
