# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of earlier versions, and of this one for the next: each is read, and says what it said when it was made.

Beside each checkpoint of a small model is a file with its scores of images that follow from a formula.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
from anomalib.engine import Engine

from anomalib_dhkd import Dhkd, Quickstart, __version__
from tests.helpers import fit, small_dhkd

FOLDER = Path(__file__).parents[1] / "checkpoints"


def _scores(model: Dhkd) -> list[float]:
    """Return the scores of four images: waves, finer from one to the next."""
    row, column = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    waves = [torch.stack([row.div(fine).sin(), column.div(fine).cos(), (row + column).sin()]) for fine in (32, 8, 4, 1)]
    with torch.no_grad():
        return model.eval()(torch.stack(waves).add(1).div(2)).pred_score.flatten().tolist()


def _make(quickstart: Quickstart, folder: Path, checkpoint: Path) -> None:
    weights = folder / "weights.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    model = small_dhkd(
        backbone="test_resnet", layers=["layer1", "layer2"], weights=weights, frequency_branch=False, width=4,
        train_steps=4, pre_processor=Dhkd.configure_pre_processor((32, 32)),
    )  # fmt: skip
    engine, _ = fit(quickstart, folder, model)
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.write_bytes(Path(engine.best_model_path).read_bytes())
    checkpoint.with_suffix(".json").write_text(json.dumps(_scores(model)) + "\n")


def test_this_version_has_its_checkpoint(quickstart: Quickstart, tmp_path: Path) -> None:
    checkpoint = FOLDER / f"{__version__}.ckpt"
    if not checkpoint.exists():
        _make(quickstart, tmp_path, checkpoint)
        pytest.fail(f"{checkpoint} was missing; it was made now, to be committed with its scores.")


@pytest.mark.parametrize("checkpoint", sorted(FOLDER.glob("*.ckpt")), ids=lambda path: path.stem)
def test_the_scores_are_those_of_its_own_version(checkpoint: Path, quickstart: Quickstart, tmp_path: Path) -> None:
    expected = json.loads(checkpoint.with_suffix(".json").read_text())
    assert len({round(score, 3) for score in expected}) == 4
    assert _scores(Dhkd.load_from_checkpoint(checkpoint)) == pytest.approx(expected, abs=1e-4)
    model = Dhkd()
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, logger=False)
    engine.test(model=model, datamodule=quickstart, ckpt_path=checkpoint, verbose=False)
    assert _scores(model) == pytest.approx(expected, abs=1e-4)
