"""The configuration classes, under the name that users of a model repository expect at its top level."""

from modeling_trips.configuration_trips import (
    TripsConfig,
    TripsDecoderConfig,
    TripsFusionConfig,
    TripsTextConfig,
    TripsVisionConfig,
)


__all__ = ["TripsConfig", "TripsDecoderConfig", "TripsFusionConfig", "TripsTextConfig", "TripsVisionConfig"]
