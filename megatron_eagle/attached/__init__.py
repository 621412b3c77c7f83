"""A draft beside a model in memory, in a trainer that is not this project's own.

Reading order: ``attach.py`` (the one call), ``draft.py`` (the object that it returns),
``capture.py`` (hooks on the model's own forward), ``micro_batch.py`` (the trainer's masks and
positions), ``live_base.py`` (the training step), ``model_kinds.py`` (GPTModel or HybridModel),
``describe.py``, ``refusals.py``, ``export.py``.
"""
