# SPDX-License-Identifier: Apache-2.0

"""The mixture of local Gaussians."""

import numpy as np
import torch
from scipy.spatial.distance import cdist

from anomalib_dhkd.components.mixture import FeatureMixture


def test_distance_is_that_of_mahalanobis_to_the_nearest_gaussian() -> None:
    generator = np.random.default_rng(0)
    parts = [
        generator.normal(size=(2000, 6)) @ generator.normal(size=(6, 6)) + 30 * generator.normal(size=6)
        for _ in range(3)
    ]
    seen = torch.from_numpy(np.concatenate(parts)).float().reshape(60, 10, 10, 6).permute(0, 3, 1, 2)
    mixture = FeatureMixture(6, 3)
    mixture.fit([[seen[:32]], [seen[32:]]], prior=0.0)

    new = np.concatenate([part[:25] + generator.normal(size=(25, 6)) for part in parts])
    found = mixture([torch.from_numpy(new).float().reshape(3, 25, 1, 6).permute(0, 3, 1, 2)])
    assert found.shape == (3, 1, 25, 1)
    expected = [
        cdist(new, part.mean(axis=0)[None], "mahalanobis", VI=np.linalg.inv(np.cov(part.T))).ravel() for part in parts
    ]
    # The decomposition is approximate.
    np.testing.assert_allclose(found.flatten(), np.min(expected, axis=0) ** 2 / 6, rtol=0.05)


def test_fewer_positions_than_gaussians() -> None:
    features = [torch.randn(2, 6, 3, 3)]
    mixture = FeatureMixture(6, 50)
    mixture.fit([features])
    assert mixture(features).max() < 1 < mixture([feature + 10 for feature in features]).min()
