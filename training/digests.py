"""Digests of parameters: sha256 over dtype, shape and numbers."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def array(tensor: "Tensor") -> np.ndarray:
    """A parameter as a NumPy array on the CPU; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu().contiguous()  # safetensors 0.8 writes a transposed array in the wrong order
    return (tensor.float() if tensor.dtype.itemsize == 2 and tensor.is_floating_point() else tensor).numpy()


def sha256_tensor(tensor: np.ndarray) -> str:
    """Of dtype, shape and numbers, in hex."""
    head = f"{tensor.dtype.str}{tensor.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(tensor).tobytes()).hexdigest()
