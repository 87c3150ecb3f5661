# SPDX-License-Identifier: Apache-2.0

"""The mixture of local Gaussians: its distance, and what it is fitted to."""

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn import functional as F  # noqa: N812

from anomalib_dhkd.components.mixture import FeatureMixture

CHANNELS = 6


def _maps(rows: torch.Tensor) -> list[torch.Tensor]:
    """Return rows as features of one scale, an image of 4 x 4 positions a 16 rows."""
    return [rows.reshape(-1, 4, 4, rows.shape[1]).permute(0, 3, 1, 2)]


def _clusters(count: int) -> torch.Tensor:
    """Return positions around three centres; within each, the first channel varies the most."""
    centres = 10 * torch.eye(CHANNELS)[:3].repeat_interleave(count // 3, dim=0)
    rows = centres + torch.randn(len(centres), CHANNELS) * torch.tensor([2.0, 1, 0.5, 0.5, 0.5, 0.5])
    return rows[torch.randperm(len(rows))]


@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_distance_is_mahalanobis_to_the_nearest_of_the_three_likeliest(size: tuple[int, int]) -> None:
    mixture = FeatureMixture(10, 7, rank=3)
    mixture.whitening.normal_()
    mixture.means.normal_()
    mixture.round_variances.uniform_(0.5, 2)
    mixture.other_variances.uniform_(0.5, 2)
    mixture.directions.copy_(0.9 * torch.linalg.qr(torch.randn(7, 10, 3)).Q.mT)
    coarse = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    features = [torch.randn(3, 4, *size), torch.randn(3, 6, *coarse)]
    joined = torch.cat([F.interpolate(features[0], size=coarse, mode="bilinear"), features[1]], dim=1)
    rows = joined.permute(0, 2, 3, 1) @ mixture.whitening
    round_ones = MultivariateNormal(mixture.means, mixture.round_variances[:, None, None] * torch.eye(10))
    likeliest = round_ones.log_prob(rows[..., None, :]).topk(3, dim=-1).indices
    precisions = torch.eye(10) - mixture.directions.mT @ mixture.directions
    precisions = precisions / mixture.other_variances[:, None, None]
    differences = rows[..., None, :] - mixture.means
    everyone = torch.einsum("bhwkc,kcd,bhwkd->bhwk", differences, precisions, differences)
    distances, nearest = everyone.gather(-1, likeliest).min(dim=-1, keepdim=True)
    torch.testing.assert_close(mixture(features), distances.movedim(-1, 1) / 10, atol=1e-4, rtol=1e-4)
    assert torch.equal(mixture.nearest(features), likeliest.gather(-1, nearest)[..., 0])


def test_fitted_to_clusters_it_knows_their_shapes() -> None:
    mixture = FeatureMixture(CHANNELS, 3, rank=2)
    mixture.fit([_maps(_clusters(3072)) for _ in range(4)], floor=0)
    assert mixture(_maps(_clusters(3072))).mean().item() == pytest.approx(1, abs=0.1)
    centre = 10 * torch.eye(CHANNELS)[0]
    wide, narrow = centre.clone(), centre.clone()
    wide[0] += 4
    narrow[5] += 4
    distances = [mixture(_maps(place.expand(16, -1))).mean().item() for place in (centre, wide, narrow)]
    # Two standard deviations in one channel of six, and eight.
    assert distances == pytest.approx([0, 4 / 6, 64 / 6], rel=0.2, abs=0.1)
    between = _maps((10 / 3 * torch.eye(CHANNELS)[:3].sum(dim=0)).expand(16, -1))
    assert mixture(between).min() > 10


def test_floor_counts_directions_that_hardly_vary_for_less() -> None:
    spread = torch.tensor([1.0, 1, 1, 1, 1, 0.1])  # mean variance 5.01 / 6
    rows = torch.randn(6400, CHANNELS) * spread
    usual, rare = 3 * torch.eye(CHANNELS)[0], 3 * torch.eye(CHANNELS)[5]
    ratios = []
    for floor in (0.0, 0.25):
        mixture = FeatureMixture(CHANNELS, 1, rank=1)
        mixture.fit([_maps(rows)], floor=floor)
        ratios.append((mixture(_maps(rare.expand(16, -1))).mean() / mixture(_maps(usual.expand(16, -1))).mean()).item())
    # Variances of 1 against 0.01, and the 0.001 that is always added; with the floor's share of the mean added to both.
    added = 0.25 * 5.01 / 6
    assert ratios == pytest.approx([1 / 0.011, (1 + added) / (0.01 + added)], rel=0.15)


def test_rare_positions_are_not_anomalous() -> None:
    batches = [_maps(_clusters(768)) for _ in range(4)]
    rare = torch.full((CHANNELS,), -6.0)
    batches[2][0][5] = rare[:, None, None]  # one image of 192
    mixture = FeatureMixture(CHANNELS, 16, rank=2)
    mixture.fit(batches)
    distance = mixture(_maps(rare.expand(16, -1)))
    assert distance.max() < torch.cat([mixture(batch) for batch in batches]).mean()


def test_fewer_positions_than_gaussians() -> None:
    features = [torch.randn(1, CHANNELS, 2, 3)]
    mixture = FeatureMixture(CHANNELS, 20)
    mixture.fit([features])
    distances = mixture(features)
    assert distances.isfinite().all()
    assert distances.max() < mixture([features[0] + 5]).min()


def test_constant_features() -> None:
    features = [torch.ones(2, CHANNELS, 4, 4)]
    mixture = FeatureMixture(CHANNELS, 4)
    mixture.fit([features])
    assert mixture(features).abs().max() < 1e-3
    assert mixture([features[0] + 1]).isfinite().all()


def test_many_positions_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("anomalib_dhkd.components.mixture.MAX_VALUES", 2 * 400)
    mixture = FeatureMixture(2, 100)
    values = torch.arange(2000.0)
    batches = _maps(torch.stack([values, -values], dim=1))[0].split(5)
    with caplog.at_level("INFO", logger="anomalib_dhkd"):
        mixture.fit([batch] for batch in batches)
    assert "Fitted 100 local Gaussians to 400 of 2000 training positions." in caplog.text
    means = (mixture.means @ torch.linalg.inv(mixture.whitening))[:, 0].sort().values
    # Everywhere along the line, as far as a random fifth of it goes.
    assert means[0] < 60
    assert means[-1] > 1940
    assert means.diff().max() < 100
