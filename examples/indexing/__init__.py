"""Lance tables of image vectors: reading images, embedding with Ray, indexing and search."""
