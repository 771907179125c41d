"""Hold a penalty on input gradients to account.

from lvlmva_core.testing.penalty import PenaltyTests

class TestMine(PenaltyTests):
    name = "mine"
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment.stacked_mlp import StackedMlp, linear_layers
from lvlmva_core.penalties import Penalty, penalty_of
from lvlmva_core.testing.checks import global_generators_left_alone, refused

CLASSES, CHANNELS, HEIGHT, WIDTH = 4, 2, 4, 5
STEP = 1e-6


class PenaltyTests:
    """What a penalty owes an alignment. Subclass it, set `name`, and let pytest collect it."""

    name: str

    def penalty(self) -> Penalty:
        """The penalty under test, by its name."""
        return penalty_of(self.name)

    def test_a_number_for_each_sample(self) -> None:
        """(B,), finite, not negative, in the images' dtype, and not zero for all."""
        for dtype in (torch.float64, torch.float32):
            model, (images, masks, labels) = _network().to(dtype), _batch()
            found = self.penalty().measure(model, images.to(dtype), masks, labels).detach()
            assert found.shape == (len(images),)
            assert found.dtype == dtype
            assert bool(torch.isfinite(found).all()), found
            assert bool((found > 0).all()), found

    def test_an_empty_mask_costs_nothing_and_a_larger_one_no_less(self) -> None:
        """Only what lies inside the mask counts."""
        model, (images, masks, labels) = _network(), _batch()
        measure = self.penalty().measure
        nothing = measure(model, images, torch.zeros_like(masks), labels)
        everything = measure(model, images, torch.ones_like(masks), labels)
        some = measure(model, images, masks, labels)
        assert not bool(nothing.any()), "an empty mask costs something"
        assert bool((some <= everything * (1 + 1e-12)).all()), "a part of the picture costs more than the whole"
        assert bool((some < everything).all()), "what lies outside the mask counts"

    def test_weights_cost_less_than_the_whole_mask(self) -> None:
        """Masks may be weights in [0, 1]; 1 is what True is."""
        model, (images, masks, labels) = _network(), _batch()
        measure = self.penalty().measure
        whole = measure(model, images, masks, labels).detach()
        torch.testing.assert_close(measure(model, images, masks.float(), labels).detach(), whole)
        half = measure(model, images, masks.float() / 2, labels).detach()
        assert bool(((half > 0) & (half < whole)).all()), "half a weight costs nothing, or as much as a whole one"

    def test_samples_are_independent(self) -> None:
        """Also with BatchNorm, also in train mode."""
        model, (images, masks, labels) = _network().train(), _batch()
        measure = self.penalty().measure
        together = measure(model, images, masks, labels).detach()
        for n in range(len(images)):
            one = slice(n, n + 1)
            alone = measure(model, images[one], masks[one], labels[one]).detach()
            torch.testing.assert_close(alone, together[one], rtol=1e-9, atol=0)

    def test_the_gradient_in_the_parameters_is_its_central_difference(self) -> None:
        """What training follows is what is measured."""
        model, (images, masks, labels) = _network(), _batch()
        weight = next(model.parameters())
        self.penalty().measure(model, images, masks, labels).sum().backward()
        assert weight.grad is not None, "no gradient reaches the parameters"
        assert bool(weight.grad.any()), "no gradient reaches the parameters"
        for place in [(0, 0, 0, 0), (1, 1, 2, 1), (2, 0, 1, 2)]:
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[place] += sign * STEP
                values.append(float(self.penalty().measure(model, images, masks, labels).detach().sum()))
                with torch.no_grad():
                    weight[place] -= sign * STEP
            wanted = (values[0] - values[1]) / (2 * STEP)
            np.testing.assert_allclose(float(weight.grad[place]), wanted, rtol=1e-4, atol=1e-8)

    def test_the_model_and_the_inputs_come_back(self) -> None:
        """Modes, buffers and pictures are as they were, also after an exception; nothing is drawn or seeded."""
        model, (images, masks, labels) = _network().train(), _batch()
        list(model.children())[1].eval()
        modes = [module.training for module in model.modules()]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        pixels = images.clone()
        with global_generators_left_alone():
            self.penalty().measure(model, images, masks, labels)
        assert [module.training for module in model.modules()] == modes, "a mode was not restored"
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items()), "buffers moved"
        assert torch.equal(images, pixels)
        assert not images.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters()), "gradients were accumulated"
        handle = list(model.modules())[-1].register_forward_hook(_raise)
        try:
            self.penalty().measure(model, images, masks, labels)
        except ZeroDivisionError:
            pass
        else:
            raise AssertionError("the model's own exception was swallowed")
        finally:
            handle.remove()
        assert [module.training for module in model.modules()] == modes, "a mode was not restored after an exception"

    def test_masks_of_another_shape_or_type_are_refused(self) -> None:
        """A mask that broadcasts would punish other pixels than it says."""
        model, (images, masks, labels) = _network(), _batch()
        for wrong in (masks.long(), masks[:1], masks[:, :1], masks[:, None]):
            with refused("mask"):
                self.penalty().measure(model, images, wrong, labels)

    def test_the_closed_form_is_what_double_backward_gives(self) -> None:
        """For ReLU MLPs of several depths, where it has one: losses and gradients, inside masks and weights."""
        if self.penalty().closed_form is None:
            return
        images, hard, labels = _batch()
        weights = torch.from_numpy(np.random.default_rng(1).random(hard.shape))
        for depth, masks in ((1, hard), (2, hard), (3, hard), (3, weights)):
            model = _mlp(depth)
            layers = linear_layers(model)
            assert layers is not None
            rrr_lambda = 0.7
            stack = StackedMlp(layers, 1)
            rows = torch.cat([images, images]).flatten(1)[None]
            inside = masks[:, None].expand(images.shape).flatten(1).double()[None]
            found = stack.backward(
                rows, labels[None], inside, torch.tensor([rrr_lambda], dtype=torch.float64), penalty=self.name
            )
            measured = self.penalty().measure(model, images, masks, labels).sum() / len(images)
            loss = functional.cross_entropy(model(images), labels) + rrr_lambda * measured
            torch.testing.assert_close(found[1][0], measured.detach(), rtol=1e-9, atol=0)
            wanted = torch.autograd.grad(loss, list(model.parameters()))
            for n in range(depth):
                for tensor, gradient in ((stack.weights[n], wanted[2 * n]), (stack.biases[n], wanted[2 * n + 1])):
                    assert tensor.grad is not None
                    torch.testing.assert_close(tensor.grad[0], gradient, rtol=1e-8, atol=1e-12)

    def test_it_is_found_by_its_name(self) -> None:
        """In the settings of an alignment."""
        settings = AlignSettings(rrr_lambda=1.0, learning_rate=1e-3, epochs=1, seeds=[0], penalty=self.name)
        assert settings.penalty == self.name


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((3, CHANNELS, HEIGHT, WIDTH)))
    return images, torch.from_numpy(rng.random((3, HEIGHT, WIDTH)) < 0.5), torch.tensor([2, 0, 3])


def _network() -> nn.Sequential:
    """Smooth, so that differences can be taken; BatchNorm, so that samples could be coupled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(CHANNELS, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(3 * HEIGHT * WIDTH, CLASSES)).double().eval()


def _mlp(depth: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        widths = [CHANNELS * HEIGHT * WIDTH, *[7, 6][: depth - 1], CLASSES]
        layers: list[nn.Module] = [nn.Flatten()]
        for n in range(depth):
            layers += [nn.ReLU()] if n else []
            layers.append(nn.Linear(widths[n], widths[n + 1]))
        return nn.Sequential(*layers).double()


def _raise(*_: object) -> None:
    raise ZeroDivisionError
