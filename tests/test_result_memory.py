"""Large results on the CPU are written to memory of earlier ones: never to any that is in use, nor is too much kept."""

import threading

import pytest
import torch

import wmha.functional as F

pytestmark = pytest.mark.cpu

SHAPE = (1, 2, 4096, 64)  # 2 MiB


def attend(seed, shape=SHAPE):
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _ in range(3)]
    return F.attention(*inputs, window=(3, 0)), F.attention(*(x.double() for x in inputs), window=(3, 0))


def test_memory_of_a_freed_result_is_used_again():
    output, _ = attend(0)
    place = output.data_ptr()
    del output
    outputs = [attend(seed)[0] for seed in range(4)]
    assert place in [output.data_ptr() for output in outputs]


def test_results_in_use_are_left_alone():
    kept = []
    for seed in range(12):
        output, expected = attend(seed)
        kept.append((output if seed % 2 else output[:, 1:], expected if seed % 2 else expected[:, 1:]))
        del output  # a view holds on to its memory
    for output, expected in kept:
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    places = [output.untyped_storage().data_ptr() for output, _ in kept]
    assert len(set(places)) == len(places)


def test_threads_take_and_free_at_once():
    wrong = []

    def work(first):
        for seed in range(first, first + 20):
            output, expected = attend(seed, (1, 1, 4096, 64))
            if not torch.allclose(output.double(), expected, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_results_can_be_resized_and_shared():
    output, expected = attend(1)
    output.resize_(1, 2, 8192, 64)
    torch.testing.assert_close(output.flatten()[: expected.numel()].double(), expected.flatten(), atol=1e-5, rtol=0)
    output.untyped_storage().resize_(0)
    output, expected = attend(2)
    output.share_memory_()
    assert output.is_shared()
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


KEEP = """
import torch
import wmha.functional as F

def resident():  # bytes
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

inputs = [torch.randn(1, 1, 1 << 17, 64) for _ in range(3)]  # 32 MiB each
F.attention(*(x[:, :, :1000] for x in inputs), window=(0, 0))
before = resident()
outputs = [F.attention(*inputs, window=(0, 0)) for _ in range(16)]
used = resident() - before
del outputs
print(used / 2**20, (resident() - before) / 2**20)
"""


def test_no_more_than_256_mib_are_kept(run_python):
    used, kept = (float(word) for word in run_python(KEEP).split())
    assert used > 500
    assert 200 < kept < 270
