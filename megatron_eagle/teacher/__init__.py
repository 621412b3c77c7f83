"""The frozen base: aux hidden states, embeddings, and the teacher's targets."""
