import pytest
import torch


@pytest.fixture(autouse=True)
def _forget_graphs():
    """torch.compile gives up on a function that it has compiled too often, in whichever tests."""
    yield
    torch._dynamo.reset()
