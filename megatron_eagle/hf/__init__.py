"""Hugging Face directories: strict reading of bases, and the checkpoints made from them.

Reading order: `safetensors_dir` (the files), `entries` and `families` (the name tables),
`base_chunks` and `import_base` (the streamed conversion to a Megatron `torch_dist` checkpoint).
"""
