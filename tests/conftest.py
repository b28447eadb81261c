"""Tests of the core run on one thread, in float64 and with a fixed seed, and leave the settings as they were."""

from collections.abc import Iterator

import pytest
import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # one that was built for another torch fails for want of its operators, and transformers with it
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _float64_and_a_fixed_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    if "race" in request.path.parts:  # trains real tasks, in their own precision
        yield
        return
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the tensors of the tests are small: threads cost more than they give
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)
