"""Cuts of vocabularies and sequences over process groups, collectives, and matrix products."""
