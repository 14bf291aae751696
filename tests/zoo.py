"""Tiny random models of every family, built in code.

    model = zoo.build("rt_detr", num_queries=7)      # any field of the config can be set
    inputs = zoo.batch(pad=True)                     # pixel_values, labels, pixel_mask

Heads, norms and offsets are randomised: as transformers initialises them, many are zeros or ones, and a wrong hidden
state, layer or norm would not show in the predictions.
"""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedModel

from hf_detrkd.families import FAMILIES

transformers.logging.set_verbosity_error()

SIZE = 64
"""Side of the images in pixels."""
WIDTH, LAYERS, QUERIES, CLASSES = 16, 3, 6, 5


def _resnet(*stages: str) -> dict:
    # residual additions of "basic" layers need embedding_size == hidden_sizes[0]
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return {"model_type": "resnet", **sizes, "out_features": list(stages)}


def _detr(*stages: str) -> dict:
    return {
        "backbone_config": _resnet(*(stages or ("stage4",))),
        "d_model": WIDTH,
        "encoder_layers": 1,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": WIDTH,
        "decoder_ffn_dim": WIDTH,
        "num_queries": QUERIES,
        "dropout": 0.0,
    }


def _deformable(**settings) -> dict:
    stages = _detr("stage2", "stage3", "stage4")
    # Its projections norm 32 groups, which need 2 values each on the last level of one token
    return {**stages, "d_model": 64, "num_feature_levels": 4, "two_stage_num_proposals": QUERIES, **settings}


def _dab() -> dict:
    config = _detr()
    return {"hidden_size": config.pop("d_model"), **config}


def _rt(**settings) -> dict:
    backbone = {"model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16]}
    return {
        "backbone_config": {**backbone, "depths": [1, 1, 1, 1], "layer_type": "basic", "out_indices": [2, 3, 4]},
        "encoder_hidden_dim": WIDTH,
        "encoder_in_channels": [8, 16, 16],
        "encoder_ffn_dim": WIDTH,
        "encoder_attention_heads": 2,
        "num_attention_heads": 2,
        "hidden_expansion": 1.0,
        "d_model": WIDTH,
        "num_queries": QUERIES,
        "decoder_in_channels": [WIDTH] * 3,
        "decoder_ffn_dim": WIDTH,
        "decoder_layers": LAYERS,
        "decoder_attention_heads": 2,
        "num_denoising": 8,
        **settings,
    }


def _d_fine(**settings) -> dict:
    backbone = {
        "model_type": "hgnet_v2",
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 8, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 8, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_indices": [2, 3, 4],
    }
    return _rt(backbone_config=backbone, hidden_size=WIDTH, decoder_n_points=[2, 4, 2], **settings)


def _lw(model_type: str, **backbone) -> dict:
    vit = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    return {
        "backbone_config": {"model_type": model_type, **vit, "out_indices": [1, 2, 3], **backbone},
        "d_model": WIDTH,
        "decoder_layers": LAYERS,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
        "decoder_ffn_dim": WIDTH,
        "num_queries": QUERIES,
        "group_detr": 3,
        "dropout": 0.0,
    }


def _yolos() -> dict:
    vit = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": WIDTH}
    return {**vit, "image_size": [SIZE, SIZE], "patch_size": 16, "num_detection_tokens": QUERIES}


CONFIGS: dict[str, tuple[str, dict]] = {
    "detr": ("detr", _detr()),
    "table-transformer": ("table-transformer", _detr()),
    "conditional_detr": ("conditional_detr", _detr()),
    "deformable_detr": ("deformable_detr", _deformable()),
    "deformable_detr_refine": ("deformable_detr", _deformable(with_box_refine=True)),
    "deformable_detr_two_stage": ("deformable_detr", _deformable(with_box_refine=True, two_stage=True)),
    "dab-detr": ("dab-detr", _dab()),
    "rt_detr": ("rt_detr", _rt()),
    "rt_detr_v2": ("rt_detr_v2", _rt()),
    "d_fine": ("d_fine", _d_fine()),
    "deimv2": ("deimv2", _d_fine()),
    "lw_detr": (
        "lw_detr",
        {
            **_lw("lw_detr_vit", pretrain_image_size=SIZE, window_block_indices=[0], num_windows=4),
            "projector_scale_factors": [1.0],
        },
    ),
    "rf_detr": ("rf_detr", _lw("rf_detr_dinov2", num_windows=2)),
    "yolos": ("yolos", _yolos()),
}
NAMES: list[str] = [name for name, (model_type, _) in CONFIGS.items() if model_type in transformers.CONFIG_MAPPING]
"""All of `CONFIGS` that the installed transformers has."""
REPLAYED: list[str] = [name for name in NAMES if FAMILIES[CONFIGS[name][0]].replays]
"""Those with a decoder that takes other queries."""


def config(name: str, classes: int = CLASSES, **overrides):
    """The tiny config called ``name``, with fields of the config set otherwise."""
    model_type, settings = CONFIGS[name]
    labels = {
        "id2label": {i: f"class {i}" for i in range(classes)},
        "label2id": {f"class {i}": i for i in range(classes)},
    }
    return AutoConfig.for_model(model_type, **{**settings, **labels, **overrides})


def build(
    name: str, *, seed: int = 0, classes: int = CLASSES, attn_implementation: str | None = None, **overrides
) -> PreTrainedModel:
    """A tiny random detector, one of `NAMES`, in evaluation mode."""
    implementation = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForObjectDetection.from_config(config(name, classes, **overrides), **implementation)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            in_backbone = any(part in parameter_name for part in ("backbone", "conv_encoder"))
            if in_backbone and parameter.dim() == 4:  # HGNetV2's own are so small that no image gets through
                torch.nn.init.kaiming_normal_(parameter, generator=generator)
            elif parameter.requires_grad and parameter.dim() > 0 and not in_backbone:
                # Matrices keep the scale of what they map; vectors are biases and norms
                scale = 1.2 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.2
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def batch(
    size: int = 2,
    *,
    targets: tuple[int, ...] = (3, 2),
    classes: int = CLASSES,
    seed: int = 0,
    pad: bool = False,
    labels: bool = True,
    image_size: int = SIZE,
) -> dict:
    """Arguments of ``model.forward``.

    Args:
        size: B.
        targets: number of objects of the images, repeated over the batch; 0 is allowed.
        pad: the right half of every second image is padding, with a ``pixel_mask`` that says so.
        labels: whether ``labels`` are among the arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {"pixel_values": torch.randn(size, 3, image_size, image_size, generator=generator)}
    if labels:
        inputs["labels"] = []
        for image in range(size):
            number = targets[image % len(targets)]
            centres = torch.rand(number, 2, generator=generator) * 0.5 + 0.25
            sizes = torch.rand(number, 2, generator=generator) * 0.3 + 0.1
            inputs["labels"].append(
                {
                    "class_labels": torch.randint(0, classes, (number,), generator=generator),
                    "boxes": torch.cat([centres, sizes], dim=-1),
                }
            )
    if pad:
        mask = torch.ones(size, image_size, image_size, dtype=torch.long)
        mask[1::2, :, image_size // 2 :] = 0
        inputs["pixel_mask"] = mask
        inputs["pixel_values"] = inputs["pixel_values"] * mask[:, None]
    return inputs
