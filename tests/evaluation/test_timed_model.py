"""The model that is timed is in eval mode, and comes back as it was."""

import pytest
from torch import nn

from stratavit import Setting
from stratavit.evaluation import latency


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_model_that_is_timed_is_in_eval_mode(dtype, training, monkeypatch):
    seen = []

    class Witness(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            seen.append(self.training or self.norm.training)
            return self.norm(images)

    model = Witness().train(training)
    one = latency.runner(model, (3, 8, 8), Setting(dtype=dtype))
    assert len(seen) >= 2
    assert not any(seen)
    assert model.training == model.norm.training == training
    assert int(one.model.norm.num_batches_tracked) == 0
