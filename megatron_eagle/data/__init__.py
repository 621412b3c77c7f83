"""Training data: JSONL of answers, supervised-token counts, regeneration."""
