"""Langevin dynamics: plain gradient descent when cold, the right spread when warm."""

import math

import pytest
import torch

from recipes.denoiser.sgld import SGLD


def _quadratic(weight, stiffness=2.0):
    return stiffness * weight.square().sum() / 2


def _trained(make, steps=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((7, 5), (5,))]
    x = torch.randn(30, 5, generator=generator)
    optimizer = make(weights)
    for _ in range(steps):
        optimizer.zero_grad()
        ((x @ weights[0].T).tanh().mean() + (x @ weights[1]).sigmoid().mean()).backward()
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("foreach", [False, True])
def test_at_temperature_zero_it_is_sgd_to_the_last_bit(foreach):
    cold, _ = _trained(lambda weights: SGLD(weights, lr=0.3, temperature=0.0))
    plain, _ = _trained(lambda weights: torch.optim.SGD(weights, lr=0.3, foreach=foreach))
    for found, expected in zip(cold, plain, strict=True):
        assert torch.equal(found, expected)


def test_a_warm_step_is_the_formula():
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    _quadratic(weight).backward()
    before, gradient = weight.detach().clone(), weight.grad.clone()
    SGLD([weight], lr=0.1, temperature=0.5, seed=3).step()
    noise = (weight.detach() - before + 0.1 * gradient) / math.sqrt(2 * 0.1 * 0.5)
    again = torch.zeros(2, requires_grad=True)
    again.grad = torch.zeros(2)
    # with lr 0.5 and temperature 1 the step is the noise alone
    SGLD([again], lr=0.5, temperature=1.0, seed=3).step()
    torch.testing.assert_close(noise, again.detach())
    assert noise.abs().min() > 0


@pytest.mark.parametrize(("lr", "temperature"), [(0.05, 0.5), (0.5, 0.02)])
def test_on_a_quadratic_the_spread_is_that_of_the_theory(lr, temperature):
    # x <- (1 - lr k) x + sqrt(2 lr T) n has the variance 2 lr T / (1 - (1 - lr k)^2)
    stiffness = 2.0
    weight = torch.zeros(20_000, requires_grad=True)
    optimizer = SGLD([weight], lr=lr, temperature=temperature)
    for _ in range(100):
        optimizer.zero_grad()
        _quadratic(weight, stiffness).backward()
        optimizer.step()
    expected = 2 * lr * temperature / (1 - (1 - lr * stiffness) ** 2)
    found = weight.detach().double()
    # 20,000 independent chains: the variance is known to 1 %
    assert abs(found.var() / expected - 1) < 0.05
    assert abs(found.mean()) < 5 * (expected / 20_000) ** 0.5


def test_the_noise_is_its_own_and_the_same_for_the_same_seed():
    before = torch.get_rng_state()
    one, _ = _trained(lambda weights: SGLD(weights, lr=0.1, temperature=0.1, seed=1))
    torch.rand(3)
    two, _ = _trained(lambda weights: SGLD(weights, lr=0.1, temperature=0.1, seed=1))
    other, _ = _trained(lambda weights: SGLD(weights, lr=0.1, temperature=0.1, seed=2))
    torch.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    _trained(lambda weights: SGLD(weights, lr=0.1, temperature=0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_differs_from_step_to_step_and_between_groups():
    weights = [torch.zeros(50, requires_grad=True) for _ in range(2)]
    optimizer = SGLD([{"params": [weight]} for weight in weights], lr=0.5, temperature=1.0)
    for weight in weights:
        weight.grad = torch.zeros(50)
    optimizer.step()
    first = [weight.detach().clone() for weight in weights]
    optimizer.step()
    second = [weight.detach() - one for weight, one in zip(weights, first, strict=True)]
    for i, a in enumerate([*first, *second]):
        for b in [*first, *second][i + 1 :]:
            assert not torch.allclose(a, b)


def test_a_resumed_run_goes_on_as_it_would_have_gone():
    def step(weight, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            _quadratic(weight).backward()
            optimizer.step()

    whole = torch.ones(9, requires_grad=True)
    step(whole, SGLD([whole], lr=0.1, temperature=1.0), 6)
    half = torch.ones(9, requires_grad=True)
    first = SGLD([half], lr=0.1, temperature=1.0)
    step(half, first, 3)
    resumed = half.detach().clone().requires_grad_()
    second = SGLD([resumed], lr=0.7, temperature=0.0)
    second.load_state_dict(first.state_dict())
    step(resumed, second, 3)
    assert torch.equal(resumed, whole)


def test_parameters_without_gradient_stay():
    weight = torch.ones(3, requires_grad=True)
    SGLD([weight], lr=0.1, temperature=1.0).step()
    assert torch.equal(weight.detach(), torch.ones(3))


def test_a_closure_is_called_with_gradients():
    weight = torch.ones(3, requires_grad=True)
    optimizer = SGLD([weight], lr=0.25)

    def closure():
        loss = _quadratic(weight)
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize("name", ["lr", "temperature"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_number_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0, got {value}"):
        SGLD([torch.ones(1, requires_grad=True)], **{name: value})
