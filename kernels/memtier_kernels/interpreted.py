"""A pytest plugin (``-p memtier_kernels.interpreted``): without a GPU, kernels run in Triton's interpreter.

Triton decides when a kernel is defined, its own library of kernels included, so the choice must be made before anything
imports it: earlier than any conftest of a folder of tests.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
