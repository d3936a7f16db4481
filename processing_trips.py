"""The processor, under the name that users of a model repository expect at its top level."""

from modeling_trips.processing_trips import TripsProcessor


__all__ = ["TripsProcessor"]
