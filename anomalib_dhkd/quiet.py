# SPDX-License-Identifier: Apache-2.0

"""Silence for what other packages say of themselves and a user can do nothing about."""

import warnings

for message in (
    "Importing from timm.models.layers is deprecated",
    "The anomalib.models.components.dinov2 package is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Found \d+ module\(s\) in eval mode",  # the backbone, and the network whose phase it isn't
    "`max_epochs` was not set",  # the model's budget ends the training
    "The dirpath has changed from",  # a checkpoint that is tested or predicted with from another folder
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # anomalib adds its own
    r"The ``compute`` method of metric \w+ was called before the ``update`` method",  # without masks
):
    warnings.filterwarnings("ignore", message)
