# SPDX-License-Identifier: Apache-2.0

"""The models that are compared, all on the same backbone."""

from typing import Any

from anomalib.models import Cflow, Padim, Stfpm
from anomalib.models.components import AnomalibModule

from anomalib_dhkd import Dhkd

FEATURES: dict[str, Any] = {"backbone": "efficientnet_lite0_bundled", "layers": ("blocks.2", "blocks.4")}
MODELS: dict[str, tuple[type[AnomalibModule], dict[str, Any]]] = {
    "Dhkd": (Dhkd, {}),
    "Padim": (Padim, {"n_features": 100}),
    "Cflow": (Cflow, {}),
    "Stfpm": (Stfpm, {}),
}
"""Classes and what their arguments need on this backbone."""
EPOCHS = {"Dhkd": None, "Padim": 1, "Cflow": 50, "Stfpm": 100}
"""Length of training in anomalib's example configurations; DHKD has its own budget."""


def create(name: str, image_size: int = 256, **arguments: Any) -> AnomalibModule:
    """Return a new model on the common backbone.

    Args:
        name (str): A key of ``MODELS``.
        image_size (int): Height and width that images are resized to.
        **arguments: Further arguments of the model.

    Returns:
        AnomalibModule: The model.

    Raises:
        ValueError: If there is no such model.
    """
    if name not in MODELS:
        msg = f"models must be some of {list(MODELS)}, got '{name}'."
        raise ValueError(msg)
    model_class, needed = MODELS[name]
    pre_processor: Any = model_class.configure_pre_processor((image_size, image_size))
    return model_class(**FEATURES, **needed, pre_processor=pre_processor, **arguments)


def make_exportable(model: AnomalibModule) -> None:
    """Work around what keeps a built-in model from being exported.

    CFlow's forward moves its decoders to the images' device, which ``torch.export`` of PyTorch 2.15 refuses.

    Args:
        model (AnomalibModule): A trained model; changed in place.
    """
    if isinstance(model, Cflow):
        network: Any = model.model
        for decoder in network.decoders:
            decoder.to = lambda _device, decoder=decoder: decoder
