"""Quantization: static int8 (Q/DQ) for ONNX, AWQ and GPTQ for language models, and their calibration texts."""
