import torch

from sap_fast.random_state import RandomState


def test_what_was_drawn_is_drawn_again():
    state = RandomState([])
    drawn = torch.rand(3)
    assert not torch.equal(torch.rand(3), drawn)
    state.restore()
    assert torch.equal(torch.rand(3), drawn)
    state.restore()
    assert torch.equal(torch.rand(3), drawn)


def test_a_device_without_a_generator_of_its_own_may_be_named():
    state = RandomState([torch.device("cpu"), torch.device("meta")])
    drawn = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), drawn)
