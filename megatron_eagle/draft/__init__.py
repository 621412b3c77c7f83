"""The draft: Megatron-Core layers behind a 2H first layer, and its vocabulary."""
