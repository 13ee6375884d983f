"""Every kernel, in every configuration the autotuner may pick, becomes machine code with no GPU: it fits, it spills no
register, and it multiplies matrices by matrix instructions."""

import pytest
import torch

from memtier.errors import ConfigError, KernelError
from memtier_kernels.testing import OPS, compile_report

# where the sizes of a report are not the largest that the kernels take in that dtype
SIZES = {("span_attention", torch.float32): {"D": 64}}
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_without_spills_and_with_matrix_instructions(op, dtype, arch):
    rows = compile_report(op, arch, dtype=dtype, **SIZES.get((op, dtype), {}))
    assert rows
    for row in rows:
        assert row["op"] == op
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_BYTES[arch], row
        assert row["has_mma"] == row["has_dot"], row


def test_a_report_on_an_unknown_op_is_refused():
    with pytest.raises(ConfigError, match="ssm"):
        compile_report("ssm", "sm_80")


def test_what_does_not_compile_is_an_error_that_says_why():
    with pytest.raises(KernelError, match="sm_12"):
        compile_report("innovation", 12)


@pytest.mark.timeout(400)
def test_float32_gradients_of_large_heads_are_not_compiled_since_they_would_spill():
    rows = compile_report("span_attention", "sm_90", dtype=torch.float32)
    assert {row["kernel"] for row in rows} == {"attend", "merge_splits"}
    assert all(row["spill_bytes"] == 0 for row in rows)


def test_float32_heads_beyond_the_kernels_are_refused_with_the_limit():
    with pytest.raises(KernelError, match="128 channels"):
        compile_report("span_attention", "sm_90", dtype=torch.float32, D=256)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_rows_too_long_for_registers_have_a_gradient_that_does_not_spill(arch):
    rows = compile_report("gated_rms_norm", arch, dtype=torch.bfloat16, E=16_384)
    assert {row["kernel"] for row in rows} == {"_forward", "_row_sums", "_backward"}
    assert all(row["spill_bytes"] == 0 for row in rows)
