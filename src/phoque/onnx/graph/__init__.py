"""Trace a model into an ONNX graph: one decoder layer is traced and repeated for all of them."""
