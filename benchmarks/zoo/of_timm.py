"""timm: networks of images. Small sizes go to the registered function, or to the class where that fixes them."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from zoo.absent import without_torchvision
from zoo.entry import Built, Entry, images, less

ONES, WIDTHS, HEADS = (1, 1, 1, 1), (16, 24, 32, 40), (2, 2, 2, 2)
VISION = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
WINDOWS = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "drop_path_rate": 0.0,
}
PERCEPTRONS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
COAT = {"img_size": 64, "patch_size": 4, "embed_dims": (16,) * 4, "serial_depths": ONES, "num_heads": 8}
MAXXVIT = {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": ONES}
ENTRY = {"in_chs": 32, "out_chs": 32, "stride": 2}
MIDDLE = {"in_chs": 32, "out_chs": (32, 32, 48), "stride": 1, "no_skip": True}

# name: (image size, options)
# fmt: off
NAMED: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {"channels": (8, 16, 24, 32), "layers": ONES}),
    "resnet50": (64, {"channels": (8, 8, 16, 16), "layers": ONES}),
    "resnext50_32x4d": (64, {"channels": (64, 64, 64, 64), "layers": ONES, "cardinality": 8}),
    "seresnet50": (64, {"channels": (8, 8, 16, 16), "layers": ONES}),
    "skresnet18": (64, {"channels": (32, 32, 64, 64), "layers": ONES}),
    "resnest14d": (64, {"channels": (8, 8, 16, 16)}),
    "res2net50_26w_4s": (64, {"channels": (8, 8, 16, 16), "layers": ONES}),
    "resnetv2_50x1_bit": (64, {"channels": (128,) * 4, "stem_chs": 32}),
    "nf_resnet50": (64, {"depths": ONES, "channels": (32, 32, 64, 64), "stem_chs": 16}),
    "dm_nfnet_f0": (64, {"depths": ONES, "channels": (16, 32, 32, 32), "group_size": 8, "stem_chs": 16,
        "num_features": 32}),
    "regnety_002": (64, {"w0": 8, "wa": 8.0, "wm": 2.0, "depth": 8, "group_size": 8}),
    "densenet121": (64, {"growth_rate": 8, "block_config": HEADS}),
    "dla34": (64, {"levels": (1,) * 6, "channels": (8, 8, 16, 16, 32, 32)}),
    "dpn48b": (64, {"num_init_features": 8, "k_r": 32, "groups": 8, "k_sec": ONES, "inc_sec": (8,) * 4}),
    "efficientnet_b0": (64, {}),
    "mobilenetv2_035": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mnasnet_small": (64, {}),
    "ghostnet_050": (64, {"drop_rate": 0.0}),
    "hrnet_w18_small": (64, {}),
    "rexnet_100": (64, {"width_mult": 0.3}),
    "repvgg_a0": (64, {"stem_chs": 16}),
    "starnet_s050": (64, {}),
    "convnext_tiny": (64, {"depths": ONES, "dims": WIDTHS}),
    "convnextv2_tiny": (64, {"depths": ONES, "dims": WIDTHS}),
    "inception_next_tiny": (64, {"depths": ONES, "dims": WIDTHS}),
    "mambaout_femto": (64, {"depths": ONES, "dims": WIDTHS}),
    "vit_tiny_patch16_224": (32, VISION),
    "vit_relpos_small_patch16_224": (32, VISION),
    "deit_tiny_distilled_patch16_224": (32, VISION),
    "deit3_small_patch16_224": (32, VISION),
    "beit_base_patch16_224": (32, VISION),
    "eva02_tiny_patch14_224": (32, VISION),
    "cait_xxs24_224": (32, VISION),
    "xcit_nano_12_p8_224": (32, VISION),
    "convit_tiny": (32, VISION),
    "swin_tiny_patch4_window7_224": (32, WINDOWS),
    "swinv2_tiny_window8_256": (32, WINDOWS),
    "maxvit_tiny_tf_224": (64, {**MAXXVIT, "stem_width": 16, "head_hidden_size": 64}),
    "coatnet_0_224": (64, {**MAXXVIT, "stem_width": 16, "head_hidden_size": 64}),
    "pvt_v2_b0": (64, {"depths": ONES, "embed_dims": (8, 16, 40, 64)}),
    "levit_128s": (64, {"img_size": 64, "embed_dim": (16, 32, 48), "key_dim": 8, "num_heads": (2, 2, 2),
        "depth": (1, 1, 1)}),
    "davit_tiny": (64, {"depths": ONES, "embed_dims": (16, 32, 32, 64), "num_heads": HEADS}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "fastvit_t8": (64, {"layers": ONES, "embed_dims": (16, 16, 32, 32)}),
    "hiera_tiny_224": (64, {"img_size": 64, "embed_dim": 16, "stages": ONES}),
    "efficientvit_b0": (64, {"widths": (8, 16, 16, 32, 32), "depths": (1,) * 5, "head_dim": 8,
        "head_widths": (64, 64)}),
}
# fmt: on

# name: (class, image size, options), where the registered function fixes the sizes
# fmt: off
CLASSES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vgg": ("vgg.VGG", 64, {"cfg": [8, "M", 16, "M", 16, "M", 16, "M", 16, "M"], "mlp_ratio": 0.01}),
    "xception": ("xception_aligned.XceptionAligned", 64, {"block_cfg": [{**ENTRY, "in_chs": 64}, ENTRY, MIDDLE]}),
    "convmixer": ("convmixer.ConvMixer", 64, {"dim": 32, "depth": 2, "kernel_size": 3, "patch_size": 4}),
    "mixer": ("mlp_mixer.MlpMixer", 32, PERCEPTRONS),
    "resmlp": ("mlp_mixer.MlpMixer", 32, {**PERCEPTRONS, "mlp_ratio": 4, "block_layer": "mlp_mixer:ResBlock",
        "norm_layer": "mlp_mixer:Affine"}),
    "gmlp": ("mlp_mixer.MlpMixer", 32, {**PERCEPTRONS, "mlp_ratio": 6, "block_layer": "mlp_mixer:SpatialGatingBlock",
        "mlp_layer": "mlp_mixer:GatedMlp"}),
    "coat": ("coat.CoaT", 64, {**COAT, "parallel_depth": 1}),
    "coat_lite": ("coat.CoaT", 64, COAT),
    "crossvit": ("crossvit.CrossVit", 48, {"img_size": 48, "patch_size": (8, 16), "embed_dim": (16, 32),
        "depth": ((1, 1, 0), (1, 1, 0)), "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)}),
    "poolformer": ("metaformer.MetaFormer", 64, {"depths": ONES, "dims": (16, 16, 32, 32),
        "layer_scale_init_values": 1e-5, "res_scale_init_values": None, "use_mlp_head": False}),
    "caformer": ("metaformer.MetaFormer", 64, {"depths": ONES, "dims": (32, 32, 64, 64),
        "token_mixers": ("metaformer:SepConv",) * 2 + ("metaformer:Attention",) * 2,
        "norm_layers": ("metaformer:LayerNorm2dNoBias",) * 2 + ("metaformer:LayerNormNoBias",) * 2}),
    "volo": ("volo.VOLO", 64, {"layers": ONES, "img_size": 64, "embed_dims": (16, 32, 32, 32), "num_heads": HEADS,
        "stem_hidden_dim": 8}),
    "edgenext": ("edgenext.EdgeNeXt", 64, {"dims": (16, 16, 32, 32), "depths": HEADS, "heads": (4,) * 4}),
    "focalnet": ("focalnet.FocalNet", 64, {"embed_dim": 16, "depths": ONES, "drop_path_rate": 0.0}),
    "twins": ("twins.Twins", 64, {"img_size": 64, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2),
        "depths": ONES}),
    "tnt": ("tnt.TNT", 32, {**less(VISION, "num_heads"), "inner_dim": 8, "num_heads_inner": 2, "num_heads_outer": 2}),
    "visformer": ("visformer.Visformer", 64, {"img_size": 64, "init_channels": 8, "embed_dim": 32, "depth": (1, 1, 1),
        "num_heads": 2}),
    "pit": ("pit.PoolingVisionTransformer", 64, {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1),
        "heads": (2, 2, 2)}),
    "nest": ("nest.Nest", 64, {"img_size": 64, "embed_dims": (16, 16, 32), "num_heads": (2, 2, 2), "depths": (1, 1, 1),
        "drop_path_rate": 0.0}),
    "sequencer": ("sequencer.Sequencer2d", 56, {"img_size": 56, "layers": ONES, "embed_dims": (16, 24, 24, 24),
        "hidden_sizes": (8,) * 4}),
    "gcvit": ("gcvit.GlobalContextVit", 64, {"img_size": 64, "embed_dim": 16, "depths": HEADS, "num_heads": HEADS,
        "window_ratio": (32, 32, 16, 32)}),
}
# fmt: on


def build_named(name: str, size: int, options: dict[str, Any]) -> Built:
    """A registered model of timm with these options."""
    with without_torchvision():
        import timm
    return timm.create_model(name, num_classes=10, **options), (images(size),), {}


def build_class(path: str, size: int, options: dict[str, Any]) -> Built:
    """A class of timm, "file.Class"; options that are names "file:Name" are looked up, too."""
    with without_torchvision():
        import timm.models  # noqa: F401 - its modules are imported by name, with torchvision away

    def found(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(found, value))
        return timm_name(*value.split(":")) if isinstance(value, str) and ":" in value else value

    made = timm_name(*path.split("."))(num_classes=10, **{key: found(value) for key, value in options.items()})
    return made, (images(size),), {}


def timm_name(file: str, name: str) -> Any:
    """``name`` of ``timm.models.file``."""
    return getattr(importlib.import_module(f"timm.models.{file}"), name)


def timm_entries() -> list[Entry]:
    """Networks of images."""
    named = [Entry("timm", name, partial(build_named, name, *row)) for name, row in NAMED.items()]
    return named + [Entry("timm", name, partial(build_class, *row)) for name, row in CLASSES.items()]
