"""From rows on disk or on the Hub to packed batches with a loss mask, streamed and resumable."""
