# SPDX-License-Identifier: Apache-2.0

"""MVTec AD under the name that anomalib's command line used to know."""

from anomalib.data import MVTecAD


class MVTec(MVTecAD):
    """The same as :class:`anomalib.data.MVTecAD`; its being imported makes ``--data MVTec`` resolve."""
