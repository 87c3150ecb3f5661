# SPDX-License-Identifier: Apache-2.0

"""anomalib's command line with the plugin imported: ``python -m anomalib_dhkd <subcommand>``.

The package is imported before this module runs, so the short names (``--model Dhkd``, ``--data Quickstart``) resolve.
"""

from anomalib.cli.cli import main

if __name__ == "__main__":
    main()
