"""Conversion of chats and texts to token ids with an exact loss mask."""
