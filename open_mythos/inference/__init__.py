"""Inference: static-shape decoding, CUDA graphs, quantized weights."""
