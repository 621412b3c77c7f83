"""What a draft is trained for: the K-step unroll, its loss, its metrics."""
