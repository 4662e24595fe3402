"""Registers and memory of the CUDA kernels, as the compiler left them, against the table in cuda_resources.txt."""

import pytest

import cuda_resources


def test_no_kernel_takes_more_than_recorded():
    try:
        built = cuda_resources.of_library()
    except cuda_resources.Missing as missing:
        pytest.skip(str(missing))
    worse = "\n".join(cuda_resources.complaints(built, cuda_resources.read_table()))
    assert not worse, f"{worse}\nIf that is meant to be: {cuda_resources.UPDATE}"
