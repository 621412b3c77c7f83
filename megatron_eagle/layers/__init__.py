"""Build transformer layers of base and draft from Megatron-Core's or Transformer Engine's modules.

* ``backend``: the choice between the two, as builders.
* ``base_spec``: the base's layers without Transformer Engine.
* ``lean_layers``: a norm and a gated MLP that keep little for backward.
* ``group_router``: group-limited expert routing.
"""
