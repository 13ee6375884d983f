"""A pytest plugin (``-p memtier_kernels.interpreted``): without a GPU, kernels run in Triton's interpreter.

Triton decides when a kernel is defined, its own library of kernels included, so the choice must be made before anything
imports it: earlier than any conftest of a folder of tests.
"""

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from memtier_kernels.triton_interpreter import patch_once_a_launch

        patch_once_a_launch()
