"""
BentoML service with adaptive batching for a TRIPS checkpoint: question answering, captioning, matching and features.

    TRIPS_MODEL=examples/trips-tiny-scenes bentoml serve trips_serving.service:Trips
"""
