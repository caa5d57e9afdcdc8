"""The average of the weights: what it holds, when it moves, how it is stored."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos.errors import ConfigError, DataError, InternalError
from open_mythos.hub.averages import UPDATES, averaged_model
from open_mythos.hub.pretrained import save_pretrained
from open_mythos.run_folder import AVERAGE_FILE
from open_mythos.train import build_model
from open_mythos.train.optimizers.ema import WeightAverage
from open_mythos.train.optimizers.optim import freeze_halting_gate

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def model(make_run):
    model = build_model(make_run())
    freeze_halting_gate(model)
    return model


@torch.no_grad()
def shake(model, step):
    """Change every weight, and the router biases, as a step would."""
    generator = torch.Generator().manual_seed(step)
    for value in (*model.parameters(), *model.buffers()):
        value += 0.1 * torch.randn(value.shape, generator=generator)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_covers_what_training_changes(model):
    held = set(WeightAverage(model, 0.9).state_dict()) - {UPDATES}
    assert held == {name for name in model.state_dict() if ".halting." not in name}
    assert any(name.endswith("router_bias") for name in held)


def test_the_recursion_by_hand(model):
    average = WeightAverage(model, 0.5)
    name = "recurrent.blocks.0.ffn.gate_up"
    want = model.get_parameter(name).detach().double().clone()
    for n in range(12):
        shake(model, n)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * model.get_parameter(name).detach().double()
    assert decay == 0.5  # the warm-up has ended, after 8 updates
    assert int(average.state_dict()[UPDATES]) == 12
    torch.testing.assert_close(average.state_dict()[name].double(), want, rtol=1e-5, atol=1e-6)


def test_the_warm_up_forgets_the_untrained_weights(model):
    """Without it, 0.999^50 = 95 % of them would be left after 50 steps."""
    average = WeightAverage(model, 0.999)
    with torch.no_grad():
        model.head.weight.fill_(1.0)
    average._averages["head.weight"].zero_()
    for _ in range(50):
        average.update()
    assert average.state_dict()["head.weight"].min() > 0.9999


def test_a_step_that_is_skipped_leaves_no_trace(model):
    average, same = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for step, changed in enumerate((True, False, True, False, False, True)):
        before = copy.deepcopy(average.state_dict())
        shake(model, step)
        average.update(torch.tensor(changed))
        if changed:
            same.update()
        else:
            assert_equal(average.state_dict(), before)
    assert_equal(average.state_dict(), same.state_dict())


def test_it_begins_again_with_the_present_weights(model):
    average = WeightAverage(model, 0.9)
    shake(model, 0)
    average.update()
    shake(model, 1)
    average.restart()
    assert_equal(average.state_dict(), WeightAverage(model, 0.9).state_dict())


def test_it_does_not_touch_the_model_nor_share_its_memory(model):
    before = weights(model)
    average = WeightAverage(model, 0.9)
    average.update()
    assert_equal(weights(model), before)
    theirs = {value.data_ptr() for value in model.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in average.state_dict().values()}


def test_inside_swap_the_model_is_the_average(model):
    average = WeightAverage(model, 0.9)
    for step in range(3):
        shake(model, step)
        average.update()
    before, averages = weights(model), copy.deepcopy(average.state_dict())
    parameters = list(model.parameters())
    inside = {}

    def evaluate_and_fail():
        with average.swap():
            inside.update(weights(model))
            assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate_and_fail()
    for name, value in inside.items():
        assert torch.equal(value, before[name] if ".halting." in name else averages[name]), name
    assert inside.keys() == before.keys()
    assert_equal(weights(model), before)
    assert_equal(average.state_dict(), averages)


def test_nothing_is_done_to_averages_that_are_swapped_in(model):
    average = WeightAverage(model, 0.9)
    state = average.state_dict()
    with average.swap():
        for act in (average.update, average.state_dict, lambda: average.load_state_dict(state)):
            with pytest.raises(InternalError, match="exchanged"):
                act()
        with pytest.raises(InternalError), average.swap():
            pass
    average.update()


def test_resumed_equals_uninterrupted_bit_for_bit(model, tmp_path):
    straight = WeightAverage(model, 0.8)
    for step in range(6):
        shake(model, step)
        straight.update()
        if step == 2:
            save_file(straight.state_dict(), tmp_path / AVERAGE_FILE)
            other = copy.deepcopy(model)
    again = WeightAverage(other, 0.8)
    again.load_state_dict(load_file(tmp_path / AVERAGE_FILE))
    for step in range(3, 6):
        shake(other, step)
        again.update()
    assert_equal(again.state_dict(), straight.state_dict())


def _without(state):
    del state["head.weight"]


def _another(state):
    state["head.bias"] = torch.zeros(3)


def _wider(state):
    state["head.weight"] = torch.zeros(14, 16)


def _uncounted(state):
    del state[UPDATES]


@pytest.mark.parametrize("damage", [_without, _another, _wider, _uncounted])
def test_a_state_that_does_not_fit_changes_nothing(model, damage):
    average = WeightAverage(model, 0.9)
    state = {name: value + 1 for name, value in average.state_dict().items()}
    damage(state)
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(DataError, match="averages are not of this model"):
        average.load_state_dict(state)
    assert_equal(average.state_dict(), before)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_decays_out_of_range(model, decay):
    with pytest.raises(ConfigError, match="decay"):
        WeightAverage(model, decay)


def test_narrow_weights_are_refused(model):
    with pytest.raises(ConfigError, match="narrow"):
        WeightAverage(model.bfloat16(), 0.9)


def test_a_checkpoint_gives_the_averaged_model(model, tmp_path):
    average = WeightAverage(model, 0.9)
    for step in range(3):
        shake(model, step)
        average.update()
    save_pretrained(model, tmp_path)
    with pytest.raises(DataError, match="no averaged weights"):
        averaged_model(tmp_path)
    save_file(average.state_dict(), tmp_path / AVERAGE_FILE)
    with average.swap(), torch.no_grad():
        want = model.eval()(IDS, n_loops=3)
    got = averaged_model(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(got(IDS, n_loops=3), want)
        assert not torch.equal(model(IDS, n_loops=3), want)
    save_file({"head.weight": torch.zeros(13, 16)}, tmp_path / AVERAGE_FILE)
    with pytest.raises(DataError, match="not of this model"):
        averaged_model(tmp_path)
