"""The moving average of the student."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_detrkd.ema import ExponentialMovingAverage


class Model(nn.Module):
    """A parameter, a tied one, a buffer of floats and one of integers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.tied = self.weight
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)
        self.register_buffer("mean", torch.tensor([10.0]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("hidden", torch.tensor([3.0]), persistent=False)

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.mean.fill_(10 * value)
            self.count += 1


def test_early_updates_by_hand():
    """d = (1 + t) / (10 + t): 2/11, then 3/12."""
    model = Model()
    ema = ExponentialMovingAverage(model, 0.9999)
    model.set(4.0)
    ema.update()
    first = 2 / 11 * 1 + 9 / 11 * 4
    torch.testing.assert_close(ema.average["weight"][0], torch.tensor(first))
    torch.testing.assert_close(ema.average["mean"], torch.tensor([2 / 11 * 10 + 9 / 11 * 40]))
    model.set(-1.0)
    ema.update()
    torch.testing.assert_close(ema.average["weight"][0], torch.tensor(3 / 12 * first + 9 / 12 * -1))
    assert ema.updates == 2


def test_late_updates_have_the_decay():
    """(1 + t) / (10 + t) passes .5 at t = 8."""
    model = Model()
    ema = ExponentialMovingAverage(model, 0.5)
    average = model.weight[0].item()
    for t in range(1, 20):
        model.set(float(t))
        ema.update()
        decay = (1 + t) / (10 + t) if t < 8 else 0.5
        average = decay * average + (1 - decay) * t
        assert ema.average["weight"][0].item() == pytest.approx(average, rel=1e-5)


def test_integers_are_copied_and_constants_stay():
    model = Model()
    ema = ExponentialMovingAverage(model, 0.9)
    for _ in range(3):
        model.set(2.0)
        ema.update()
    assert ema.average["count"] == 3
    assert ema.average["count"].dtype == torch.int64
    assert ema.average["frozen"] == 5
    assert ema.average["hidden"] == 3


def test_every_tensor_once():
    """Tied weights have one average, and would otherwise be updated twice."""
    assert ExponentialMovingAverage(Model(), 0.9).average.keys() == {"weight", "frozen", "mean", "count", "hidden"}


def test_the_model_is_left_alone():
    model = Model()
    ema = ExponentialMovingAverage(model, 0.9)
    model.set(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(value.requires_grad for value in ema.average.values())
    assert ema.average["weight"].data_ptr() != model.weight.data_ptr()


def test_applied_and_back():
    model = Model()
    ema = ExponentialMovingAverage(model, 0.9)
    model.set(7.0)
    ema.update()
    parameter, averaged = model.weight, ema.average["weight"].clone()
    with ema.applied():
        assert model.weight is parameter  # optimisers hold it
        torch.testing.assert_close(model.weight.detach(), averaged)
        torch.testing.assert_close(model.mean, ema.average["mean"])
    assert torch.equal(model.weight.detach(), torch.full((2,), 7.0))
    assert model.mean == 70
    torch.testing.assert_close(ema.average["weight"], averaged)


def test_back_after_an_error():
    model = Model()
    ema = ExponentialMovingAverage(model, 0.9)
    model.set(7.0)
    with pytest.raises(RuntimeError, match="stop"), ema.applied():
        raise RuntimeError("stop")
    assert torch.equal(model.weight.detach(), torch.full((2,), 7.0))


def test_what_is_done_inside_does_not_reach_the_average():
    model = Model()
    ema = ExponentialMovingAverage(model, 0.9)
    with ema.applied():
        model.set(99.0)
    assert ema.average["weight"].tolist() == [1, 2]


def test_copies():
    model = Model()
    ema = ExponentialMovingAverage(model, 0.9)
    model.set(7.0)
    ema.copy_from_model()
    assert ema.average["weight"].tolist() == [7, 7]
    model.set(8.0)
    assert ema.average["weight"].tolist() == [7, 7]  # a copy, not the tensor
    ema.copy_to_model()
    assert model.weight.tolist() == [7, 7]
    assert model.mean == 70


def test_training_goes_on_under_an_optimiser():
    """The optimiser's step is on the raw weights, before and after an evaluation."""
    model = Model()
    optimizer = torch.optim.SGD([model.weight], lr=1.0)
    ema = ExponentialMovingAverage(model, 0.9)
    for _ in range(2):
        model.weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        with ema.applied():
            pass
    assert model.weight.tolist() == [-1, 0]
