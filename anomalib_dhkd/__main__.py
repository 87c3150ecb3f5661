# SPDX-License-Identifier: Apache-2.0

"""anomalib's command line with the plugin imported: ``python -m anomalib_dhkd <subcommand>``.

The package is imported before this module runs, so the short names (``--model Dhkd``, ``--data Quickstart``) resolve.
``benchmark`` is the plugin's own, which goes further than anomalib's.
"""

from anomalib.cli.cli import main
from anomalib.cli.pipelines import PIPELINE_REGISTRY

from anomalib_dhkd.benchmark.pipeline import Benchmark

if __name__ == "__main__":
    if PIPELINE_REGISTRY is not None:
        PIPELINE_REGISTRY["benchmark"] = Benchmark
    main()
