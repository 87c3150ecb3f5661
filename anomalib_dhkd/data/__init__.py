# SPDX-License-Identifier: Apache-2.0

"""Data modules: MVTec AD under its short name, and a data set that needs no download."""

from .mvtec import MVTec
from .quickstart import Quickstart

__all__ = ["MVTec", "Quickstart"]
