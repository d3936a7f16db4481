"""Images as a Lance table of vectors: how they are read, embedded by Ray's actors, indexed and searched."""
