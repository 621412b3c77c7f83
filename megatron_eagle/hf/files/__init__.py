"""Weight files of Hugging Face models: safetensors, plain or quantized, read strictly."""
