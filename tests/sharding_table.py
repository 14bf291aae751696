"""How much of real teachers is sharded, for docs/scaling.md:  python tests/sharding_table.py"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    DeformableDetrConfig,
    PreTrainedConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    SwinConfig,
)

from hf_detrkd.families import adapter_for
from hf_detrkd.reporting.table import text_table
from hf_detrkd.sharding import LARGEST_UNIT, units_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"


def teachers() -> dict[str, PreTrainedConfig]:
    """By name. The larger ones as their checkpoints are configured (PekingU/rtdetr_r101vd; Swin-L as in DINO)."""
    r101 = RTDetrResNetConfig(depths=[3, 4, 23, 3], out_features=["stage2", "stage3", "stage4"])
    swin = SwinConfig(
        embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12, out_features=r101.out_features
    )
    return {
        "D-FINE-L": AutoConfig.for_model("d_fine"),
        "RT-DETR, ResNet-50": RTDetrConfig(),
        "RT-DETR, ResNet-101": RTDetrConfig(
            encoder_hidden_dim=384, encoder_ffn_dim=2048, backbone_config=r101, decoder_in_channels=[384] * 3
        ),
        "YOLOS, ViT-B": AutoConfig.for_model("yolos"),
        "Deformable DETR, two-stage, Swin-L": DeformableDetrConfig(
            use_timm_backbone=False, backbone=None, backbone_config=swin, two_stage=True, with_box_refine=True
        ),
    }


def table() -> str:
    rows = []
    for name, config in teachers().items():
        with torch.device("meta"):
            model = AutoModelForObjectDetection.from_config(config)
        units = [
            sum(p.numel() for p in u.parameters()) for u in units_of(adapter_for(model).before_decoder, LARGEST_UNIT)
        ]
        total = model.num_parameters()
        rows.append([name, f"{total / 1e6:.1f} M", f"{sum(units) / total:.0%}", f"{max(units) / 1e6:.1f} M"])
    return text_table(["teacher", "parameters", "sharded", "largest block"], rows, markdown=True)


if __name__ == "__main__":
    text = re.sub(r"(?m)^\| teacher .*\n(?:\|.*\n)+", table() + "\n", DOCUMENT.read_text())
    DOCUMENT.write_text(text)
