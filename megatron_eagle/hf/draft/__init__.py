"""Hugging Face drafts: export, import and what each server reads."""
