# SPDX-License-Identifier: Apache-2.0

"""Silence for what other packages say of themselves and a user can do nothing about."""

import warnings

for message in (
    "Importing from timm.models.layers is deprecated",
    "The anomalib.models.components.dinov2 package is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Found \d+ module\(s\) in eval mode",  # the backbone, and the network whose phase it isn't
    "`max_epochs` was not set",  # the model's budget ends the training
):
    warnings.filterwarnings("ignore", message)
