"""Hugging Face directories: strict reading of bases, and the checkpoints made from them.

Reading order: `safetensors_dir` (the files), `weights_dir` and `packed_weights` (weights that ship
quantized), `entries` and `families` (the name tables), `base_chunks` and `import_base` (the
streamed conversion to a Megatron `torch_dist` checkpoint).
"""
