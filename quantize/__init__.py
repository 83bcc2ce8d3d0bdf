"""Quantization: codes, schemes and recipes. Imports torch, numpy and safetensors."""
