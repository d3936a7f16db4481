"""Data of the tasks: files, annotations, images, scenes, streams -> rows -> batches."""
