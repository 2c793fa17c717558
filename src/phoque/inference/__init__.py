"""Run a model without training it: batches, generation, steering, residual streams and likelihoods."""
