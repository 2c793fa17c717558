"""Weight quantization for ONNX graphs: formats, GPTQ, SmoothQuant and the choice of bits per layer."""
