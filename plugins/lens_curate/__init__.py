"""The data engine: from raw pictures to a training store, by filters, deduplication and captions."""
