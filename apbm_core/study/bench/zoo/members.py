"""The zoo: the networks that the comparison is run on, with a small batch for each; random weights, no download."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from apbm_core.errors import ConfigError
from apbm_core.study.bench.zoo.small import SMALL

CLASSES = 10

# The smallest member of each family -> the size of its images.
CLASSIFICATION = {
    "alexnet": 96, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "googlenet": 96, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64,
    "mobilenet_v3_large": 64, "mobilenet_v3_small": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64,
    "resnet50": 64, "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "swin_t": 64,
    "swin_v2_t": 64, "vgg11_bn": 64, "vit_b_32": 64,
}  # fmt: skip
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = {
    "resnet18_fpn": 64, "resnet50_fpn": 64, "mobilenet_v3_large_fpn": 64, "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 128,
}  # fmt: skip
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")

# A member of under 12 million parameters of each family of timm that has one -> the size of its images, or -size
# where the network is told of it.
TIMM = {
    "botnet26t_256": -64, "cait_xxs24_224": -64, "coat_lite_tiny": -64, "convit_tiny": -64, "convnext_atto": 64,
    "convnextv2_atto": 64, "crossvit_tiny_240": 64, "cs3darknet_focus_s": 64, "dla46x_c": 64, "dpn48b": 64,
    "eca_resnext26ts": 64, "edgenext_xx_small": 64, "efficientformerv2_s0": -64, "efficientnet_lite0": 64,
    "efficientvim_m1": 64, "efficientvit_b0": 64, "efficientvit_m0": 64, "ese_vovnet19b_slim_dw": 64,
    "eva02_tiny_patch14_224": -64, "fasternet_t0": 64, "fastvit_t8": 64, "gcvit_xxtiny": -64, "gernet_s": 64,
    "ghostnet_050": 64, "gmlp_ti16_224": -64, "hgnetv2_b0": 64, "hrnet_w18_small": 64, "iformer_t": 64,
    "inception_next_atto": 64, "lcnet_050": 64, "legacy_seresnet18": 64, "levit_128s": -64, "mambaout_femto": 64,
    "maxvit_rmlp_pico_rw_256": -64, "mnasnet_small": 64, "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_050": 64, "mobileone_s0": 64, "mobilevit_xxs": 64, "mobilevitv2_050": 64,
    "nf_regnet_b0": 64, "pit_ti_224": -64, "poolformer_s12": 64, "pvt_v2_b0": 64, "regnetx_002": 64,
    "regnety_002": 64, "repghostnet_050": 64, "repvgg_a0": 64, "repvit_m0_9": 64, "resnest14d": 64, "resnet10t": 64,
    "resnetv2_18": 64, "rexnet_100": 64, "shvit_s1": 64, "skresnet18": 64, "starnet_s050": 64, "swiftformer_xs": 64,
    "tf_efficientnetv2_b0": 64, "tiny_vit_5m_224": 64, "tinynet_e": 64, "visformer_tiny": -64,
    "vit_tiny_patch16_224": -64, "xcit_nano_12_p16_224": 64,
}  # fmt: skip


def _classification(name: str) -> nn.Module:
    from torchvision import models

    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    more |= {"image_size": 64} if name.startswith("vit") else {}
    more |= {"aux_logits": False} if name == "inception_v3" else {}  # its auxiliary head takes no images below 299
    return getattr(models, name)(weights=None, num_classes=CLASSES, **more)


def _segmentation(name: str) -> nn.Module:
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)


def _video(name: str) -> nn.Module:
    from torchvision.models import video

    return getattr(video, name)(weights=None, num_classes=CLASSES)


def _detection(name: str) -> nn.Module:
    """The backbones, which detectors put their heads and boxes behind."""
    from torchvision.models import detection

    if name == "ssd300_vgg16":
        return detection.ssd300_vgg16(weights=None, weights_backbone=None).backbone
    if name == "ssdlite320_mobilenet_v3_large":
        return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone
    make = detection.backbone_utils
    if name == "mobilenet_v3_large_fpn":
        return make.mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6)
    return make.resnet_fpn_backbone(
        backbone_name=name.removesuffix("_fpn"), weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"timm is not installed ({error}): pip install 'apbm-core[bench]'.") from None
    more = {"img_size": -TIMM[name]} if TIMM[name] < 0 else {}
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **more)


def _images(size: int) -> Callable[[], Any]:
    return lambda: torch.randn(2, 3, abs(size), abs(size))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = (
    dict(SMALL)
    | {f"torchvision {n}": (lambda n=n: _classification(n), _images(size)) for n, size in CLASSIFICATION.items()}
    | {f"torchvision {n}": (lambda n=n: _segmentation(n), _images(64)) for n in SEGMENTATION}
    | {f"torchvision {n} backbone": (lambda n=n: _detection(n), _images(size)) for n, size in DETECTION.items()}
    | {f"torchvision {n}": (lambda n=n: _video(n), lambda: torch.randn(2, 3, 8, 64, 64)) for n in VIDEO}
    | {f"timm {n}": (lambda n=n: _timm(n), _images(size)) for n, size in TIMM.items()}
)
"""Name -> what makes the network, and what makes a batch for it."""


def build(name: str) -> tuple[nn.Module, Any]:
    """A network and a batch for it, by chance.

    Raises:
        ConfigError: there is no such network, or it needs a package that is not installed.
    """
    if name not in ZOO:
        raise ConfigError(f"the zoo has no network {name!r}; it has {', '.join(ZOO)}.")
    make, batch = ZOO[name]
    return make(), batch()
