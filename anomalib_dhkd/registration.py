# SPDX-License-Identifier: Apache-2.0

"""The one place where this plugin touches anomalib.

anomalib finds models in three ways. By import path on its command line, which needs nothing from us. By bare name
among the imported subclasses of ``AnomalibModule``, for which importing :class:`~anomalib_dhkd.Dhkd` is enough. And by
``class_path`` in ``get_model``, which the benchmark uses and which imports from the modules listed in
``anomalib.models.ALLOWED_MODULES`` only; so our package's name is added to that list.
"""

from anomalib.models import ALLOWED_MODULES

ALLOWED_MODULES.add("anomalib_dhkd")
