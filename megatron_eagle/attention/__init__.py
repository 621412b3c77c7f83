"""Attention without masks: causal kernels that return the log-sum-exp, trunk + branch."""
