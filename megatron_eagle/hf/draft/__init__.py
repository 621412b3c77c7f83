"""Hugging Face drafts: export a trained draft for a server, import a draft of another project.

Reading order: ``info`` (a draft's description), ``formats`` (the formats and who reads them) and
``names`` (the table of tensor names); for an export ``config_json``, ``card`` and ``export``, and
``plain_draft``, which reads the result back; for an import ``files``, ``parse_config``,
``import_tensors``, ``embedding`` and ``import_hf``. ``checkpoint`` is the Megatron side of both.
"""
