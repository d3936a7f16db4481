"""The scripts of TRIPS for Transformers, and what they share: `python -m trips_examples.run_vqa --help`."""

import os


# Threads that wait for each other spin for a moment and then let others run, as OpenMP reads when torch loads: scripts
# import this package first. By default they spin for long, and one other busy process makes a step many times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # without it an idle machine would lose a quarter of its speed
