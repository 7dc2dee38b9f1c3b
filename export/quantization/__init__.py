"""Quantization: static int8 (Q/DQ) for ONNX, and AWQ and GPTQ for language models."""
