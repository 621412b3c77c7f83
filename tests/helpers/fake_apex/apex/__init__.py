"""A package that looks like an installed Apex to Megatron: what it imports, and no kernel."""
