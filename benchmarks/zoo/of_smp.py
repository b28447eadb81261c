"""segmentation_models_pytorch: networks of images to images."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from zoo.absent import without_torchvision
from zoo.entry import Built, Entry, images
from zoo.of_timm import ONES

WITH_TIMM = ("tu-resnet18", 64, {"channels": (8, 16, 24, 32), "layers": ONES})
OWN = {"decoder_channels": (32, 24, 16, 8, 8)}
FLAT = {"decoder_channels": 16}
SEGMENTATION: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "Unet": (*WITH_TIMM, OWN),
    "Unet, mit_b0": ("mit_b0", 64, {}, OWN),
    "UnetPlusPlus": (*WITH_TIMM, OWN),
    "FPN": (*WITH_TIMM, {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}),
    "DeepLabV3": (*WITH_TIMM, FLAT),
    "DeepLabV3Plus": (*WITH_TIMM, FLAT),
    "PSPNet": (*WITH_TIMM, {"psp_out_channels": 32}),
    "MAnet": (*WITH_TIMM, OWN),
    "Linknet": (*WITH_TIMM, {}),
    "PAN": ("tu-resnet18", 128, WITH_TIMM[2], FLAT),
    "UPerNet": (*WITH_TIMM, FLAT),
    "Segformer": (*WITH_TIMM, {"decoder_segmentation_channels": 16}),
}


def build_segmentation(model: str, encoder: str, size: int, sizes: dict[str, Any], options: dict[str, Any]) -> Built:
    """A decoder on an encoder without weights."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with without_torchvision():
        import segmentation_models_pytorch as smp
    made = getattr(smp, model.partition(",")[0])(encoder, encoder_weights=None, classes=3, **sizes, **options)
    return made, (images(size),), {}


def smp_entries() -> list[Entry]:
    """Networks of images to images."""
    return [Entry("smp", name, partial(build_segmentation, name, *row)) for name, row in SEGMENTATION.items()]
