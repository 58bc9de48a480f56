"""The optimiser against torch's own loops and a plain moving average."""

import copy

import pytest
import torch
from torch import nn

from ds_tokimg.engine import muon
from ds_tokimg.engine.muon import Place, orthogonalized
from ds_tokimg.engine.optimizer import average_key, build_optimizer, warmed_decay

DECAYS = [0.15, 0.999]  # below what it is warmed to in twenty steps, and above


def _params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (3,), (2, 2, 2), (7,))]


def _set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


REFERENCES = [
    ({"type": "AdamW", "params": {"lr": 0.1, "betas": [0.8, 0.9]}}, torch.optim.AdamW, {"betas": (0.8, 0.9)}),
    ({"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}}, torch.optim.AdamW, {}),
    ({"type": "Adam", "params": {"lr": 0.1, "adam_w_mode": False}}, torch.optim.Adam, {}),
    ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("block", "reference_class", "settings"), REFERENCES)
def test_steps_as_the_unfused_optimiser_does(block, reference_class, settings):
    params, reference_params = _params(), _params()
    optimizer = build_optimizer(params, block, 0.999)
    reference = reference_class(reference_params, lr=0.1, weight_decay=0.0, foreach=False, **settings)
    decay = 0.01 if reference_class is torch.optim.AdamW else 0.0
    for step in range(5):
        _set_gradients(params, step)
        _set_gradients(reference_params, step)
        for p in reference_params:  # decoupled weight decay, on matrices alone
            p.data.mul_(1 - 0.1 * decay if p.ndim >= 2 else 1.0)
        optimizer.step()
        reference.step()
    for p, expected in zip(params, reference_params, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("block", [block for block, *_ in REFERENCES])
def test_averages_are_the_plain_recursion(block, decay):
    params = _params()
    optimizer = build_optimizer(params, block, decay)
    averages = [p.detach().clone() for p in params]
    for n in range(20):
        _set_gradients(params, n)
        optimizer.step()
        weight = min(decay, (1 + n) / (10 + n))
        for average, p in zip(averages, params, strict=True):
            average.mul_(weight).add_(p.detach(), alpha=1 - weight)
    for average, p in zip(averages, params, strict=True):
        torch.testing.assert_close(optimizer.state[p][average_key(decay)], average)


def _marked_params() -> list[nn.Parameter]:
    params = [*_params(), nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(12, 5))]
    for p in params[-2:]:
        p.hidden_matrix = True
    return params


def test_muon_is_torchs_for_what_is_marked_and_adamw_for_the_rest():
    """torch's takes its steps in half precision, which is what the tolerance is for."""
    params = _marked_params()
    reference = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = build_optimizer(params, {"type": "Muon", "params": {"lr": 0.1, "weight_decay": 0.02}}, 0.5)
    torchs = torch.optim.Muon(reference[-2:], lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(reference[:-2], {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.02}})
    for step in range(5):
        _set_gradients(params, step)
        _set_gradients(reference, step)
        for o in (optimizer, torchs, adamw):
            o.step()
    for p, expected in zip(params[:-2], reference[:-2], strict=True):
        assert torch.equal(p, expected)
    for p, expected in zip(params[-2:], reference[-2:], strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=4e-3)
        assert "exp_avg_sq" not in optimizer.state[p] and average_key(0.5) in optimizer.state[p]


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_steps_of_muon_are_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalized(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.min() > 0.6 and values.max() < 1.3
    # The same singular vectors.
    inside = left.T @ result @ right.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-4
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_matrices_in_pieces_step_as_whole_ones(monkeypatch):
    """A flat tensor that holds two matrices, with padding, as a rank alone gets it."""
    monkeypatch.setattr(muon, "BUCKET_SIZE", 32)
    whole = _marked_params()[-2:]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in whole] + [torch.zeros(8)]))
    flat.hidden_matrix = True
    places = [Place((6, 10), 0, 0, 60), Place((12, 5), 0, 60, 60)]
    block = {"type": "Muon", "params": {"lr": 0.1}}
    together, apart = build_optimizer([flat], block), build_optimizer(whole, block)
    together.locate = lambda tensor: places
    for step in range(3):
        _set_gradients(whole, step)
        flat.grad = torch.cat([p.grad.flatten() for p in whole] + [torch.zeros(8)])
        together.step()
        apart.step()
    torch.testing.assert_close(flat[:120], torch.cat([p.flatten() for p in whole]))
    assert not flat[120:].any()


def test_muon_without_matrices_says_so():
    with pytest.raises(ValueError, match="no parameter is marked"):
        build_optimizer(_params(), {"type": "Muon", "params": {"lr": 0.1}})


def test_parameters_without_gradient_keep_their_averages_behind():
    params = _params()
    optimizer = build_optimizer(params, {"type": "AdamW", "params": {"lr": 0.1}}, 0.9)
    _set_gradients(params, 0)
    params[0].grad = None
    optimizer.step()
    assert params[0] not in optimizer.state
    assert optimizer.state[params[1]]["updates"] == 1
    for p in params:
        p.grad = None
    before = copy.deepcopy([p.detach().clone() for p in params])
    optimizer.step()
    assert optimizer.state[params[1]]["updates"] == 1
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))


def test_saved_states_do_not_bring_their_settings():
    params = _params()
    optimizer = build_optimizer(params, {"type": "AdamW", "params": {"lr": 0.1}}, 0.9)
    _set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    kept, resumed = (
        build_optimizer(params, {"type": "AdamW", "params": {"lr": 0.3, "betas": [0.5, 0.6]}}, decay)
        for decay in (0.9, 0.5)
    )
    kept.load_state_dict(saved)
    torch.testing.assert_close(kept.state[params[0]]["ema_0.9"], optimizer.state[params[0]]["ema_0.9"])
    resumed.load_state_dict(saved)
    assert [(group["lr"], group["betas"]) for group in resumed.param_groups] == [(0.3, (0.5, 0.6))] * 2
    state = resumed.state[params[0]]
    assert "ema_0.9" not in state and "ema_0.5" not in state
    _set_gradients(params, 1)
    before = params[0].detach().clone()
    resumed.step()  # a new average starts from the weights as they were
    torch.testing.assert_close(state["ema_0.5"], torch.lerp(before, params[0].detach(), 1 - warmed_decay(0.5, 1)))


def test_weight_decay_is_for_matrices():
    optimizer = build_optimizer(_params(), {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.2}})
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(2, 0.2), (2, 0.0)]
    assert all(p.ndim >= 2 for p in optimizer.param_groups[0]["params"])


def test_unknown_optimizer_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown optimizer 'Lion'; available: AdamW, Adam, SGD"):
        build_optimizer(_params(), {"type": "Lion", "params": {"lr": 0.1}})
