# SPDX-License-Identifier: Apache-2.0

"""Tests of the feature cache."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from anomalib_dhkd.data.feature_cache import FeatureCache


@pytest.mark.parametrize(("limit", "in_file"), [(1.0, False), (0.0, True)])
def test_gives_back_what_it_was_given(limit: float, in_file: bool) -> None:
    features = [torch.randn(5, 6, 4, 3), torch.randn(5, 8, 2, 2)]
    cache = FeatureCache(5, limit)
    for part in (slice(0, 2), slice(2, 5)):
        cache.append([scale[part] for scale in features])
    assert (cache.file is not None) == in_file
    loader = DataLoader(
        cache, batch_sampler=BatchSampler(SequentialSampler(cache), 2, drop_last=False), collate_fn=lambda batch: batch
    )
    for values in ([batch.features for batch in loader], list(cache.batches(2))):
        assert [len(batch[0]) for batch in values] == [2, 2, 1]
        for scale, feature in enumerate(features):
            torch.testing.assert_close(torch.cat([batch[scale] for batch in values]), feature, rtol=1e-3, atol=1e-4)
    picked = cache.__getitems__([4, 0]).features[0]
    torch.testing.assert_close(picked, features[0][[4, 0]], rtol=1e-3, atol=1e-4)
    assert picked.is_contiguous(memory_format=torch.channels_last)


def test_the_file_does_not_count_as_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * 4096

    part = [torch.ones(100, 64, 32, 32)]
    for limit, grows in ((1.0, True), (0.0, False)):
        before = resident()
        cache = FeatureCache(2000, limit)  # 250 MiB
        for _ in range(20):
            cache.append(part)
        for features in cache.batches(50):
            assert (features[0] == 1).all()
        assert (resident() - before > 150 * 2**20) == grows
        del cache


def test_too_little_space_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"cache_limit is 0.0 GiB, so .* GiB of features go to a file in .* are free"):
        FeatureCache(1000, 0.0).append([torch.zeros(1, 8, 4, 4)])
