import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from zeroxide.cli.training import loss as module
from zeroxide.cli.training.loss import causal_lm_loss


def both(logits, labels, vocabulary, **options):
    results = []
    for function in (ForCausalLMLoss, causal_lm_loss):
        leaf = logits.clone().requires_grad_()
        value = function(logits=leaf * 1, labels=labels, vocab_size=vocabulary, **options)
        value.backward()
        results.append((value.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
def test_same_loss_and_gradient_as_transformers(monkeypatch, dtype, piece):
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", piece)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 11, 97, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, 97, (3, 11), generator=generator)
    labels[0, 4:7] = -100
    (want, want_grad), (got, got_grad) = both(logits, labels, 97)
    # Both sum some 30 fp32 numbers of size 5; a gradient differs by its last place in its own dtype.
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0)
    torch.testing.assert_close(got_grad, want_grad, rtol=torch.finfo(dtype).eps * 2, atol=1e-7)


def test_number_of_items_replaces_the_mean():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    (want, want_grad), (got, got_grad) = both(logits, labels, 7, num_items_in_batch=20)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)


def test_a_second_backward_is_refused():
    leaf = torch.randn(1, 4, 9, requires_grad=True)
    value = causal_lm_loss(leaf * 1, torch.zeros(1, 4, dtype=torch.int64), 9)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_logits_that_another_operation_keeps_are_not_silently_lost():
    leaf = torch.randn(1, 4, 9, requires_grad=True)
    logits = torch.tanh(leaf)  # tanh keeps its own output for backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        causal_lm_loss(logits, torch.zeros(1, 4, dtype=torch.int64), 9).backward()


def test_nan_comes_through():
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 0] = float("nan")
    assert torch.isnan(causal_lm_loss(logits, torch.ones(1, 3, dtype=torch.int64), 5))
