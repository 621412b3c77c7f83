"""Training data: documents with loss masks, their packing, offline features, regeneration."""
