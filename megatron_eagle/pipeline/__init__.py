"""Pipeline stages: the order of their work, their messages, and the draft's replicas on them.

``plan`` says what a stage does when; ``schedule`` and ``iteration`` do it, on a ``base_stream``.
``exchange`` moves hidden states between stages over ``links``.
"""
