"""The scripts of TRIPS for Transformers, and what they share: `python -m trips_examples.run_vqa --help`."""
