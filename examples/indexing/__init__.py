"""A collection of images as a Lance table of vectors: how it is read, embedded by Ray's actors, indexed and searched."""
