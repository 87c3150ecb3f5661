# SPDX-License-Identifier: Apache-2.0

"""Measurements behind the defaults and the documentation, each one command."""
