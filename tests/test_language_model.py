"""scripts/language_model.py: the model of the demo, the trainer and the tuner."""

import pytest
import torch

from language_model import LanguageModel, generate

pytestmark = pytest.mark.cpu


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LanguageModel(2, 32, 4, window=[5, 9], num_kv_heads=2, learned_temperature="per_head").double().eval()
    for parameter in model.parameters():  # none is zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("part", [1, 2, 7, 40])
def test_decode_continues(model, part):
    tokens = torch.randint(256, (2, 40))
    parts, state = [], None
    for some in tokens.split(part, dim=1):
        logits, state = model.decode(some, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-12, atol=1e-12)
    assert [cache.key.size(2) for cache in state.caches] == [5, 9]


def test_scripted(model):
    tokens = torch.randint(256, (2, 40))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(tokens), model(tokens))
    torch.testing.assert_close(scripted.decode(tokens, None)[0], model(tokens))


def test_sees_nothing_of_later_bytes(model):
    tokens = torch.randint(256, (1, 40))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    assert torch.equal(model(tokens)[:, :20], model(changed)[:, :20])
    assert not torch.equal(model(tokens)[:, 20], model(changed)[:, 20])


def test_reach(model):
    """A byte's logits depend on those that the windows, one after the other, and its entry reach, and no others."""
    reach = 5 + 9 + 3 + 2
    tokens = torch.randint(256, (1, 60))
    for distance, same in ((reach, False), (reach + 1, True)):
        changed = tokens.clone()
        changed[0, 59 - distance] ^= 1
        assert torch.equal(model(tokens)[:, 59], model(changed)[:, 59]) == same


def test_generate(model):
    """What it draws is drawn from the logits of the whole text."""
    text = generate(model, b"ab", 30, torch.Generator().manual_seed(1))
    assert text[:2] == b"ab" and len(text) == 32
    generator = torch.Generator().manual_seed(1)
    again = list(b"ab")
    for _ in range(30):
        probabilities = torch.softmax(model(torch.tensor([again]))[0, -1] / 0.8, -1)
        again.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    assert text == bytes(again)


def test_wrong_number_of_windows():
    with pytest.raises(ValueError, match="window must be one number or one for each of 3 layers, got 2"):
        LanguageModel(3, 32, 4, window=[5, 9])
