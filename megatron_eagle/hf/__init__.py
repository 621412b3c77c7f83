"""Hugging Face directories: import of bases, import and export of drafts.

Reading order for a base: ``files.safetensors_dir`` (the files), ``files.weights_dir`` and
``files.packed_weights`` (quantized weights), ``tables.entries`` and ``base.families`` (the name
tables), ``base.chunks`` and ``base.import_base`` (the streamed conversion to a Megatron
``torch_dist`` checkpoint). ``draft`` is about drafts.
"""
