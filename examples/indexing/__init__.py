"""Lance tables of image vectors: reading images, their vectors, an index and search."""
