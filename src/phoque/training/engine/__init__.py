"""The fast training engine: compiled layers, CUDA graphs, packed attention, fused LoRA and the token loss."""
