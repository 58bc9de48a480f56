"""Counted operations, against those that torch counts while it computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ds_tokimg.batch import BatchMaker
from ds_tokimg.codec import TokenCodec
from ds_tokimg.diffusion import TimestepSampler
from ds_tokimg.flops import matmul_peak, train_flops
from ds_tokimg.loss import TrainingLoss
from tests.tiny import layout_of, random_texts, tiny_model

CODEC = TokenCodec(50)


@pytest.mark.parametrize("head", [{"posterior": "digits"}, {"head": "linear"}])
@pytest.mark.parametrize("options", [{}, {"patch_noise": 0.5}, {"block_size": 2}, {"condition_drop": 0.0}])
def test_the_count_is_torchs(options, head):
    model = tiny_model(CODEC, **head)
    texts = random_texts(50, [256, 200, 30], [40, 20, 3])
    batch = BatchMaker(layout_of(model), TimestepSampler("band", 4), 0, **options)(texts, range(3), range(3), 0)
    module = TrainingLoss(model, "mse")
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module(batch)["loss_sum"].backward()
    counted = sum(count for kernel, count in counter.get_flop_counts()["Global"].items())
    filter_flops = 0 if "head" in head else 3 * batch["ids"].numel() * 2 * CODEC.digits_per_token * CODEC.radix
    assert train_flops(model, batch) == pytest.approx(counted, abs=filter_flops, rel=1e-9)


def test_the_peak_is_a_rate_of_products():
    assert 1e9 < matmul_peak(torch.device("cpu"), torch.float32, seconds=0.05) < 1e13
