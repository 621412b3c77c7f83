"""Pipeline stages: which layers each holds, which micro-batches it trains, what they send."""
