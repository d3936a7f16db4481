"""The scripts of TRIPS for Transformers, and what they share: `python -m trips_examples.run_vqa --help`."""

import os


# Threads that wait for each other let others run meanwhile, as OpenMP reads when torch loads: scripts import this
# package first. By default they spin, and one other busy process makes a step many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
