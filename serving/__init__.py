"""
A service that answers questions about images, writes captions, matches and compares: BentoML's, with its adaptive
batching, over a checkpoint of TRIPS.

    TRIPS_MODEL=examples/trips-tiny-scenes bentoml serve trips_serving.service:Trips
"""
