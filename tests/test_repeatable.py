"""Bitwise the same from run to run and for any number of threads, forward and backward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cases import DTYPES, Case, make_inputs

CASES = [
    Case("many_heads", batch=3, heads=4, kv_heads=2, queries=130, window=(40, 3), temperature="(Hq,)"),
    # One head: threads share its queries, and the gradients of the keys that several tasks see are added up.
    Case("one_head", batch=1, heads=1, queries=3000, key_dim=5, window=(700, 20), dropout_p=0.2, temperature="()"),
    Case("one_group", batch=1, heads=8, kv_heads=1, queries=1100, key_dim=5, window=(-1, 0), softcap=4.0),
    Case("decoding", batch=1, heads=4, queries=1, keys=5000, dropout_p=0.1),
]


def run(case, inputs):
    torch.manual_seed(0)
    results = torch.ops.wmha.attention_with_lse(*inputs.leaves[:3], **case.options(inputs.temperature))
    return *results, *torch.autograd.grad(results, inputs.leaves, (inputs.grad_output, inputs.grad_logsumexp))


def assert_same_bits(one, other):
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads(case, dtype, threads):
    inputs = make_inputs(case, dtype)
    threads(1)
    alone = run(case, inputs)
    for count in (2, 3, 7):
        threads(count)
        assert_same_bits(alone, run(case, inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_runs(case, device, threads):
    threads(2)
    inputs = make_inputs(case, torch.float32, device)
    first = run(case, inputs)
    for _ in range(5):
        assert_same_bits(first, run(case, inputs))


def test_batch_and_neighbours_change_no_bit(device):
    """A problem's bits don't depend on what else is in the batch."""
    case = Case("batch", batch=4, heads=3, queries=100, window=(20, 5), temperature="(Hq,)")
    inputs = make_inputs(case, torch.float32, device)
    options = case.options(inputs.temperature.detach())
    leaves = [leaf.detach() for leaf in inputs.leaves[:3]]
    whole = torch.ops.wmha.attention_with_lse(*leaves, **options)
    for b in range(4):
        alone = torch.ops.wmha.attention_with_lse(*(leaf[b : b + 1] for leaf in leaves), **options)
        assert_same_bits([result[b : b + 1] for result in whole], alone)


def test_several_threads_of_python(device):
    """Calls from many Python threads at once, each with its own backward."""
    case = Case("threads", heads=4, kv_heads=2, queries=200, window=(50, 0), softcap=2.0, temperature="(Hq,)")

    def work(seed):
        inputs = make_inputs(case, torch.float32, device, seed)
        results = torch.ops.wmha.attention_with_lse(*inputs.leaves[:3], **case.options(inputs.temperature))
        return *results, *torch.autograd.grad(results, inputs.leaves, (inputs.grad_output, inputs.grad_logsumexp))

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(12)))
    for seed, results in enumerate(together):
        assert_same_bits(work(seed), results)
