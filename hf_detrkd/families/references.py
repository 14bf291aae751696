"""References: the boxes (cx, cy, w, h) or centres (cx, cy) in [0, 1] that queries carry and decoders refine."""

from __future__ import annotations

import torch
from torch import Tensor

# Near enough to 0 and 1 that float32 decoders don't tell the difference, and the slope stays finite
EPS = 1e-7


def reference_logit(reference: Tensor) -> Tensor:
    """References before a sigmoid, as some decoders take them."""
    return at_least_float32(reference).logit(EPS).to(reference.dtype)


def refine(delta: Tensor, reference: Tensor) -> Tensor:
    """(..., 4) boxes from a head's output (..., 4) and the (..., 4) or (..., 2) logit of the reference it corrects."""
    size = reference.shape[-1]
    return torch.cat([delta[..., :size] + reference, delta[..., size:]], dim=-1).sigmoid()


def nearest(boxes: Tensor, reference: Tensor) -> Tensor:
    """(B, k) index of the reference (B, Q, 4 or 2) whose centre is nearest to that of each of the boxes (B, k, 4)."""
    distance = (boxes[:, :, None, :2] - reference.detach()[:, None, :, :2]).square().sum(-1)
    return distance.argmin(-1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
