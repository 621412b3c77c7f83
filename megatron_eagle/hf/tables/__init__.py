"""What the import of bases and the import and export of drafts share: fields, rope, name tables."""
