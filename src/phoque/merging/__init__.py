"""Merge an adapter into its base, tensor by tensor, and verify the merged model against base plus adapter."""
