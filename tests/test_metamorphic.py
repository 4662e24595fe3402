"""Two ways to ask for the same thing give the same thing: in values, logsumexp and gradients."""

import math

import pytest
import torch

from cases import INT64_MAX, Case, make_inputs

attention_with_lse = torch.ops.wmha.attention_with_lse


@pytest.fixture
def inputs(device):
    case = Case("metamorphic", heads=4, kv_heads=2, queries=70, key_dim=6, temperature="(Hq,)")
    return make_inputs(case, torch.float64, device)


def differentiate(inputs, function):
    """The results of function(query, key, value, temperature), and the gradients."""
    results = function(*inputs.leaves)
    return *results, *torch.autograd.grad(results, inputs.leaves, (inputs.grad_output, inputs.grad_logsumexp))


def assert_same(inputs, one, other, exactly=False):
    tolerance = 0.0 if exactly else 1e-11
    for first, second in zip(differentiate(inputs, one), differentiate(inputs, other), strict=True):
        torch.testing.assert_close(first, second, atol=tolerance, rtol=tolerance)


def with_window(left, right, **options):
    return lambda query, key, value, temperature: attention_with_lse(
        query, key, value, temperature=temperature, window_left=left, window_right=right, **options
    )


@pytest.mark.parametrize("window", [(70, 70), (69, 69), (INT64_MAX, INT64_MAX), (-1, 69), (1000, -1)])
def test_window_as_long_as_the_sequence_is_dense(window, inputs):
    assert_same(inputs, with_window(-1, -1), with_window(*window), exactly=True)


def test_left_bound_as_long_as_the_sequence_is_causal(inputs):
    assert_same(inputs, with_window(-1, 0), with_window(69, 0), exactly=True)


def test_window_is_dense_attention_on_its_keys(inputs):
    """Each query alone, with the keys of its window cut out."""

    def one_by_one(query, key, value, temperature):
        results = []
        for i in range(query.size(2)):
            keys = slice(max(i - 9, 0), i + 4)
            results.append(
                attention_with_lse(query[:, :, i : i + 1], key[:, :, keys], value[:, :, keys], temperature=temperature)
            )
        return tuple(torch.cat(parts, 2) for parts in zip(*results, strict=True))

    assert_same(inputs, with_window(9, 3), one_by_one)


@pytest.mark.parametrize("parts", [(30, 40), (1, 69), (48, 16, 6)])
def test_queries_in_parts(parts, inputs):
    def in_parts(query, key, value, temperature):
        results, offset = [], 0
        for part in query.split(parts, 2):
            options = {"window_left": 9, "window_right": 3, "query_offset": offset, "temperature": temperature}
            results.append(attention_with_lse(part, key, value, **options))
            offset += part.size(2)
        return tuple(torch.cat(pieces, 2) for pieces in zip(*results, strict=True))

    assert_same(inputs, with_window(9, 3), in_parts)


@pytest.mark.parametrize("window", [(9, 0), (-1, 0), (0, 0)])
def test_decoding_step_by_step(window, inputs):
    """The default offset puts the last query on the last key of the cache."""

    def decode(query, key, value, temperature):
        options = {"window_left": window[0], "window_right": window[1], "temperature": temperature}
        steps = [
            attention_with_lse(query[:, :, n : n + 1], key[:, :, : n + 1], value[:, :, : n + 1], **options)
            for n in range(query.size(2))
        ]
        return tuple(torch.cat(parts, 2) for parts in zip(*steps, strict=True))

    assert_same(inputs, with_window(*window), decode)


def test_keys_in_parts_merge_by_logsumexp(inputs):
    """Two calls, each with some of the keys, weighted by what logsumexp says; some queries see no key of one part."""

    def in_parts(query, key, value, temperature):
        options = {"window_left": 9, "window_right": 3, "temperature": temperature}
        first = attention_with_lse(query, key[:, :, :25], value[:, :, :25], query_offset=0, **options)
        second = attention_with_lse(query, key[:, :, 25:], value[:, :, 25:], query_offset=-25, **options)
        logsumexp = torch.logaddexp(first[1], second[1])
        return sum(part[0] * (part[1] - logsumexp).exp().unsqueeze(-1) for part in (first, second)), logsumexp

    assert_same(inputs, with_window(9, 3), in_parts)


def test_grouped_heads_are_repeated_heads(inputs):
    def repeated(query, key, value, temperature):
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return attention_with_lse(query, key, value, temperature=temperature, window_left=9, window_right=3)

    assert_same(inputs, with_window(9, 3), repeated)


def test_permuting_the_batch(inputs):
    def permuted(query, key, value, temperature):
        results = with_window(9, 3)(query.flip(0), key.flip(0), value.flip(0), temperature)
        return tuple(result.flip(0) for result in results)

    assert_same(inputs, with_window(9, 3), permuted)


def test_permuting_the_heads(inputs):
    def permuted(query, key, value, temperature):
        results = with_window(9, 3)(query.flip(1), key.flip(1), value.flip(1), temperature.flip(0))
        return tuple(result.flip(1) for result in results)

    assert_same(inputs, with_window(9, 3), permuted)


def test_mirrored_sequence_mirrors_the_window(inputs):
    def mirrored(query, key, value, temperature):
        results = with_window(3, 9)(query.flip(2), key.flip(2), value.flip(2), temperature)
        return tuple(result.flip(2) for result in results)

    assert_same(inputs, with_window(9, 3), mirrored)


def test_scale_and_temperature_are_one_factor(inputs):
    def by_scale(query, key, value, temperature):
        scaled = query * (0.7 / temperature).view(-1, 1, 1)
        return attention_with_lse(scaled, key, value, scale=1.0, window_left=9, window_right=3)

    assert_same(inputs, with_window(9, 3, scale=0.7), by_scale)


def test_a_number_is_a_tensor_of_one_number(inputs):
    query, key, value = inputs.leaves[:3]
    for softcap in (0.0, 2.0):
        expected = attention_with_lse(query, key, value, temperature=0.3, window_left=9, softcap=softcap)
        for shape in ((), (1,), (4,)):
            temperature = torch.full(shape, 0.3, dtype=torch.float64, device=query.device)
            results = attention_with_lse(query, key, value, temperature=temperature, window_left=9, softcap=softcap)
            for one, other in zip(expected, results, strict=True):
                assert torch.equal(one, other)


def test_default_scale(inputs):
    assert_same(inputs, with_window(9, 3), with_window(9, 3, scale=1 / math.sqrt(6)), exactly=True)


def test_high_softcap_is_none(inputs):
    for first, second in zip(
        with_window(9, 3)(*inputs.leaves), with_window(9, 3, softcap=1e7)(*inputs.leaves), strict=True
    ):
        torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-9)


def test_scaled_dot_product_attention(inputs):
    """PyTorch's own, where it can do the same."""
    visible = torch.ones(70, 70, dtype=torch.bool, device=inputs.query.device).tril(3).triu(-9)

    def of_torch(query, key, value, temperature):
        logsumexp = attention_with_lse(query, key, value, window_left=9, window_right=3)[1]
        function = torch.nn.functional.scaled_dot_product_attention
        return function(query, key, value, attn_mask=visible, enable_gqa=True) + 0 * temperature.sum(), logsumexp

    def of_wmha(query, key, value, temperature):
        output, logsumexp = attention_with_lse(query, key, value, window_left=9, window_right=3)
        return output + 0 * temperature.sum(), logsumexp

    assert_same(inputs, of_wmha, of_torch)
