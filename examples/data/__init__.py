"""
Data of the tasks: files, annotations, images, scenes and streams to rows to batches.

A row that a task cannot use has a fault: its source, a reason and the value. Rows are checked, and images decoded,
before training; pairs of a stream while it is read. Faults stop the run, or are skipped and counted.
"""
