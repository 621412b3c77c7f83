"""The normalizations of the fake Apex."""
