"""Files of Hugging Face weights, safetensors and quantized ones."""
