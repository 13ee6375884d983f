"""Kernels run on the GPU where there is one, else in Triton's interpreter (`memtier_kernels.interpreted`), with fresh
buffers full of NaN."""

from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # the mode that fills fresh buffers also warns of library calls whose sums differ from run to run on a GPU
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh_buffers_are_full_of_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
