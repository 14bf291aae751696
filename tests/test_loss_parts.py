import pytest
import torch
from accelerate import Accelerator

from hf_detrkd.loss_parts import LossParts


def test_the_share_of_a_tiny_term_is_not_rounded_away():
    """The paper's weight of a term can leave it a hundred-millionth of the gradient; tune.py divides by what is logged."""
    parts = LossParts()
    norms = {"detection": torch.tensor(1.0), "kd": torch.tensor(1.0), "background": torch.tensor(2.4691358e-8)}
    outputs = {"detection_loss": torch.tensor(1.0), "terms": {"background": torch.tensor(1.0)}, "gradient_norms": norms}
    parts.add(outputs, scale=1.0)
    assert parts.means(Accelerator(cpu=True))["gradient_share_background"] == pytest.approx(1.2345679e-8, rel=1e-5)
