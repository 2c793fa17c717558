"""Training data: from rows on disk or on the Hub to packed batches with a loss mask, as a resumable stream."""
