"""Asserts of the shipped suites are told in full, like those of a test file."""

import pytest

pytest.register_assert_rewrite("memtier_backends.testing")
