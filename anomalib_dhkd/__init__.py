# SPDX-License-Identifier: Apache-2.0

"""DHKD (Denoised Heterogeneous Knowledge Distillation) as a plugin model for anomalib.

Importing this package registers the model, its bundled backbones and the short data name ``MVTec``.
"""

from . import quiet, registration  # noqa: F401
from .data import MVTec, Quickstart
from .explain import InsideVisualizer
from .lightning_model import Dhkd
from .post_processor import RankPreservingPostProcessor
from .torch_model import DhkdModel

__all__ = ["Dhkd", "DhkdModel", "InsideVisualizer", "MVTec", "Quickstart", "RankPreservingPostProcessor"]
__version__ = "0.2.0"
