"""Hugging Face directories: strict reading of bases, and the checkpoints made from them.

Reading order: `safetensors_dir` (the files), `families` (the name tables), `import_base` (the
streamed conversion to a Megatron `torch_dist` checkpoint).
"""
