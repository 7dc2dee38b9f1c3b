"""Quantization: static int8 (Q/DQ), its calibration, and the texts that language models are calibrated on."""
