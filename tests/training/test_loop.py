"""The training loop: what an interruption changes, which is nothing, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from liteframe.engines.package import InputError
from liteframe.training.loop import WINDOW, Diverged, Recipe, train
from torch import nn

RECIPE = Recipe(steps=40, batch=4, peak_lr=0.05, warmup=5, save_every=8)


class Line:
    """Learns a straight line from noisy points; dropout draws on torch's generator."""

    def __init__(self):
        torch.manual_seed(3)
        self.layer = nn.Linear(3, 1)
        self.parameters = dict(self.layer.named_parameters())

    def loss(self, step):
        x = torch.from_numpy(np.random.default_rng(step).standard_normal((8, 3)).astype(np.float32))
        x = nn.functional.dropout(x, 0.1)
        return (self.layer(x)[:, 0] - x @ torch.tensor([1.0, -2.0, 0.5]) - 1).square().mean()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end: its folder, and what it learned."""
    folder, line = tmp_path_factory.mktemp("whole"), Line()
    assert train(folder, line.parameters, line.loss, RECIPE)
    return folder, {name: value.detach().clone() for name, value in line.parameters.items()}


def test_it_learns(whole):
    losses = [line["loss"] for line in log(whole[0])]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert (whole[0] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_rates_rise_linearly_and_fall_as_a_cosine(whole):
    rates = [line["lr"] for line in log(whole[0])]
    np.testing.assert_allclose(rates[:5], 0.05 * np.arange(1, 6) / 5)
    np.testing.assert_allclose(rates[5:], 0.025 * (1 + np.cos(np.pi * np.arange(35) / 35)))


def test_a_share_of_the_rate_is_that_of_the_step(tmp_path):
    """Adam's first step is the learning rate, whatever the gradient."""
    line = Line()
    before = {name: value.detach().clone() for name, value in line.parameters.items()}
    recipe = Recipe(steps=1, batch=4, peak_lr=0.05, warmup=0, weight_decay=0.0)
    assert train(tmp_path, line.parameters, line.loss, recipe, share={"weight": 1.0, "bias": 0.2}.__getitem__)
    for name, step in (("weight", 0.05), ("bias", 0.01)):
        np.testing.assert_allclose((line.parameters[name] - before[name]).abs().detach(), step, rtol=1e-3)


@pytest.mark.parametrize("stop", [3, 8, 21])
def test_an_interrupted_run_goes_on_to_the_same_losses(whole, tmp_path, stop):
    line = Line()

    def interrupted(step):
        if step == stop:
            raise KeyboardInterrupt
        return line.loss(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, line.parameters, interrupted, RECIPE)
    line = Line()
    assert train(tmp_path, line.parameters, line.loss, RECIPE)
    assert log(tmp_path) == log(whole[0])
    for name, value in line.parameters.items():
        torch.testing.assert_close(value, whole[1][name], rtol=0, atol=0)


def test_a_stage_ends_when_its_time_is_over_and_goes_on_later(whole, tmp_path):
    line = Line()
    assert not train(tmp_path, line.parameters, line.loss, RECIPE, minutes=0.0)
    assert train(tmp_path, line.parameters, line.loss, RECIPE)
    assert log(tmp_path) == log(whole[0])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e4])
def test_a_loss_that_diverges_stops_with_the_last_good_checkpoint(tmp_path, wrong):
    line, kept = Line(), {}
    recipe = Recipe(steps=200, batch=4, peak_lr=0.01, warmup=5, save_every=10)

    def diverging(step):
        if step == 30:
            kept.update({name: value.detach().clone() for name, value in line.parameters.items()})
        return line.loss(step) if step < 35 else line.loss(step) * 0 + wrong

    with pytest.raises(Diverged, match=r"diverged at step \d+.* the checkpoint of step \d+ was kept"):
        train(tmp_path, line.parameters, diverging, recipe)
    if not np.isfinite(wrong):
        for name, value in line.parameters.items():
            torch.testing.assert_close(value.detach(), kept[name])
    assert len(log(tmp_path)) <= 35 + WINDOW


@pytest.mark.parametrize(("end", "diverges"), [(0.3, False), (3.5, True)])
def test_small_losses_may_scatter_but_not_rise_to_where_they_began(tmp_path, end, diverges):
    line = Line()

    def scripted(step):
        return line.layer.weight.sum() * 0 + (4.0 if step < 30 else 0.05 if step < 60 else end)

    recipe = Recipe(steps=100, batch=4)
    if diverges:
        with pytest.raises(Diverged, match=r"diverged at step 7\d"):
            train(tmp_path, line.parameters, scripted, recipe)
    else:
        assert train(tmp_path, line.parameters, scripted, recipe)


def test_a_gradient_that_is_no_number_is_no_step(tmp_path):
    line = Line()

    def broken(step):
        return line.loss(step) + (torch.sqrt(line.layer.bias * 0).sum() if step == 12 else 0)

    with pytest.raises(Diverged, match=r"at step 12.*gradient norm nan.* step 8 was kept"):
        train(tmp_path, line.parameters, broken, RECIPE)
    assert all(torch.isfinite(value).all() for value in line.parameters.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "can't be read"),
        (lambda path: path.write_bytes(b""), "can't be read"),
        (lambda path: torch.save({"step": 1}, path), "can't be read"),
        (lambda path: torch.save(torch.load(path) | {"parameters": {}}, path), "of another model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    line = Line()
    train(tmp_path, line.parameters, line.loss, Recipe(steps=2, batch=1))
    change(tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=rf"checkpoint\.pt: .*{message}.*delete it"):
        train(tmp_path, line.parameters, line.loss, Recipe(steps=2, batch=1))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    line = Line()
    train(tmp_path, line.parameters, line.loss, Recipe(steps=2, batch=1))
    with pytest.raises(InputError, match=r"steps=2.*steps=3.*delete it"):
        train(tmp_path, line.parameters, line.loss, Recipe(steps=3, batch=1))


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"step": Evil()}, tmp_path / "checkpoint.pt")
    line = Line()
    with pytest.raises(InputError, match="can't be read"):
        train(tmp_path, line.parameters, line.loss, RECIPE)
