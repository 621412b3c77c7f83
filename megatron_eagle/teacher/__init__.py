"""What the frozen base gives a draft: captured layers, embeddings, and targets made once."""
