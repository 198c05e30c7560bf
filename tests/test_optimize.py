"""Adam on stacked problems is Adam on each."""

import pytest
import torch

from corrigenda.modules.training.optimize import IndependentAdam

SHAPES = [(3, 4), (3, 2, 2)]  # three problems of two tensors


def loss_E(tensors, targets):
    return sum(((x - t) ** 4).flatten(1).sum(1) for x, t in zip(tensors, targets, strict=True))


def gradients(tensors, targets):
    return torch.autograd.grad(loss_E(tensors, targets).sum(), tensors)


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.1}, {"lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-4}, {"lr": 0.1, "weight_decay": 0.3}],
)
def test_each_problem_is_optimised_as_if_alone(settings):
    """The reference is torch's own Adam; problem e takes ``stops[e]`` steps and keeps its value."""
    stops = [2, 7, 5]
    start, targets = [torch.randn(s) for s in SHAPES], [torch.randn(s) for s in SHAPES]
    stacked = [x.clone().requires_grad_() for x in start]
    adam = IndependentAdam(stacked, **settings)
    frozen = {}
    for step in range(max(stops)):
        active = torch.tensor([step < stop for stop in stops])
        adam.step(gradients(stacked, targets), active)
        for e, stop in enumerate(stops):
            if step == stop - 1:
                frozen[e] = [x[e].clone() for x in stacked]
    for e, stop in enumerate(stops):
        alone = [x[e : e + 1].clone().requires_grad_() for x in start]
        torch_adam = torch.optim.Adam(alone, **settings)
        for _ in range(stop):
            goals = [t[e : e + 1] for t in targets]
            for x, g in zip(alone, gradients(alone, goals), strict=True):
                x.grad = g
            torch_adam.step()
        for x, kept, reference in zip(stacked, frozen[e], alone, strict=True):
            assert torch.equal(x[e], kept), f"problem {e} moved after it had stopped"
            torch.testing.assert_close(x[e], reference[0], atol=1e-6, rtol=1e-5)


def test_a_problem_that_has_stopped_ignores_its_gradient():
    x = torch.ones(2, 3)
    adam = IndependentAdam([x], lr=0.1)
    adam.step([torch.ones(2, 3)], torch.tensor([True, True]))
    adam.step([torch.full((2, 3), torch.nan)], torch.tensor([False, False]))
    adam.step([torch.tensor([[1.0] * 3, [torch.nan] * 3])], torch.tensor([True, False]))
    assert torch.equal(x[1], torch.full((3,), 1 - 0.1)) and x.isfinite().all()
    assert x[0, 0] < x[1, 0]
