"""Operations are those that torch's own counter sees, but for what the formula says it leaves out."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ds_tokimg.model.flops import matmul_peak
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.objective import TrainingLoss
from tests.support.tiny import maker_of, random_texts, tiny_model

CODEC = TokenCodec(50)
LENGTHS, PROMPTS = (30, 17, 60), (8, 40, 21)


def module_and_batch(objective="ce", patch_noise=0.0, conditions=False, block_size=0, **options):
    model = tiny_model(CODEC, block_size=block_size, **options)
    module = TrainingLoss(model, objective)
    maker = maker_of(module, patch_noise=patch_noise, condition_drop=0.0 if conditions else None)
    indices = np.arange(len(LENGTHS))
    return module, maker(random_texts(50, LENGTHS, PROMPTS), indices, indices, 0)


def seen_by_torch(module, batch) -> int:
    """Counted while it runs; the plain formula of attention, whose products are ordinary ones."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(batch)["loss_sum"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "options",
    [
        {"posterior": "digits"},
        {"posterior": "digits", "patch_noise": 1.0},
        {"posterior": "digits", "conditions": True},
        {"posterior": "digits", "conditions": True, "patch_noise": 1.0},
        {"posterior": "digits", "block_size": 2},
        {"posterior": "digits", "block_size": 2, "conditions": True, "patch_noise": 1.0},
        {"posterior": "digits", "block_size": 2, "noisy_depth": 1},
        {"posterior": "digits", "local_window": 0},
        {"posterior": "tree", "local_window": 1},
        {"posterior": "digits", "block_size": 2, "noisy_depth": 1, "conditions": True},
        {"posterior": "digits", "conditions": True, "block_size": 1},
        {"posterior": "tree", "block_size": 2, "noisy_depth": 1},
        {"head": "linear", "objective": "mse"},
    ],
)
def test_operations_are_what_torch_counts(options):
    module, batch = module_and_batch(**options)
    assert module.flops(batch) == seen_by_torch(module, batch)


def test_operations_of_a_posterior_over_tokens_leave_out_the_matched_filter():
    module, batch = module_and_batch(posterior="tokens")
    evidence = CODEC.digits_per_token + 1
    # Input forward and, recomputed, backward; in the loss the bias as one more column, and its gradient.
    columns = 2 * evidence + evidence + 1 + 1
    matched_filter = 2 * batch.ids.numel() * CODEC.vocab_size * columns
    assert module.flops(batch) + matched_filter == seen_by_torch(module, batch)


def test_the_peak_is_the_rate_of_a_product():
    """At least half of the rate of one product timed here, and no more than any machine has."""
    import time

    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - begun)
    slowest = 2 * 1024**3 / max(seconds)
    assert 0.5 * slowest < matmul_peak(torch.device("cpu"), torch.float32, seconds=0.3) < 1e15
