# SPDX-License-Identifier: Apache-2.0

"""Models side by side: ``python -m anomalib_dhkd benchmark``."""
