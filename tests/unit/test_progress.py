# SPDX-License-Identifier: Apache-2.0

"""Bars for what takes long outside of the training steps."""

from pathlib import Path
from typing import Any

import pytest
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from lightning.pytorch.callbacks import RichProgressBar

from tests.helpers import small_dhkd


class Recorder(RichProgressBar):
    """Keeps the bars that were there when the training ended."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.progress is not None
        self.bars = [(task.description, task.completed, task.total) for task in self.progress.tasks]
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize("cache_limit", [1.0, None])
def test_extraction_and_calibration_have_bars(
    quickstart: AnomalibDataModule, tmp_path: Path, cache_limit: float | None
) -> None:
    bar = Recorder()
    model = small_dhkd(train_steps=4, num_views=1, cache_limit=cache_limit)
    Engine(default_root_dir=tmp_path, callbacks=[bar], logger=False).fit(model=model, datamodule=quickstart)
    batches = len(quickstart.train_dataloader())
    views = batches * (2 if cache_limit else 1)  # views are batches of their own where they are kept
    found = [(text, total) for text, done, total in bar.bars if done == total]
    assert found.count(("Calibrating", views)) == 4  # statistics of features, two mixtures, statistics of distances
    assert found.count(("Extracting features", batches)) == (1 if cache_limit else 0)
