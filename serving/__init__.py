"""
HTTP service for a TRIPS checkpoint: question answering, captioning, matching and features.

    TRIPS_MODEL=examples/trips-tiny-scenes python -m trips_serving
"""
