# SPDX-License-Identifier: Apache-2.0

"""Compare rules of fusing scales and votes and of reading off an image score, and count false alarms.

``python -m anomalib_dhkd.benchmark.fusion --root path/to/mvtec_ad``

Each category is trained on three scales, seed by seed, with a part of the training images held out. The scales learn
independently of each other, so one training serves every choice of scales and every rule.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from scipy.stats import beta, betabinom
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from anomalib_dhkd import Dhkd, MVTec, RankPreservingPostProcessor
from anomalib_dhkd.anomaly_map import AnomalyMapGenerator, resize
from anomalib_dhkd.post_processor import conformal_rank, fewest_scores

LAYERS = ("blocks.2", "blocks.4", "blocks.6")


def distances(datamodule: AnomalibDataModule, seed: int, results_dir: Path, **arguments: Any) -> dict[str, Any]:
    """Train the model on images of 256 x 256 pixels and return its distance maps.

    Args:
        datamodule (AnomalibDataModule): Images with a validation split of training images.
        seed (int): Seed of the training.
        results_dir (Path): Folder for the checkpoint.
        **arguments: Arguments of the model, other than layers and mixture.

    Returns:
        dict[str, Any]: For ``train``, ``held_out`` and ``test``, the maps of shape ``(N, 1, h, w)``: the
            distance of teacher and student of each scale, then the teacher's likelihood of each scale;
            for the test images their ``labels``, of shape ``(N,)``, and ``masks``, of shape ``(N, H, W)``.
    """
    seed_everything(seed, workers=True)
    pre_processor: Any = Dhkd.configure_pre_processor((256, 256))
    model: Any = Dhkd(layers=LAYERS, mixture=0, pre_processor=pre_processor, **arguments)
    Engine(default_root_dir=results_dir, enable_progress_bar=False).fit(model, datamodule)
    model.eval()
    transform = model.pre_processor.transform
    test_data: Any = datamodule.test_data

    @torch.no_grad()
    def measure(images: Any) -> list[torch.Tensor]:
        batches = []
        for batch in DataLoader(images, batch_size=16, collate_fn=test_data.collate_fn):
            features = model.model.features(transform(batch.image))
            latents, predictions = model.model.respond(features)
            likelihoods = model.model.distances(features, latents, [torch.zeros_like(latent) for latent in latents])
            batches.append(model.model.distances(features, latents, predictions) + likelihoods)
        return [torch.cat(maps) for maps in zip(*batches, strict=True)]

    test = list(test_data)
    return {
        "train": measure(datamodule.train_data),
        "held_out": measure(datamodule.val_data),
        "test": measure(test),
        "labels": torch.stack([item.gt_label for item in test]),
        "masks": torch.stack([transform(item.gt_mask[None].float())[0] > 0.5 for item in test]),
    }


def fusions(maps: list[torch.Tensor], train: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Fuse the scales by every rule.

    Args:
        maps (list[torch.Tensor]): Maps of shape ``(N, 1, h, w)``: the distances of the scales, then the likelihoods.
        train (list[torch.Tensor]): The same of the training images.

    Yields:
        tuple[str, torch.Tensor]: Name of the rule and fused maps of shape ``(N, 1, h, w)``, the finest scale's.
    """
    scales = len(maps) // 2
    pairs = list(zip(maps, train, strict=True))
    logs = [d.log() for d in maps]
    calibrated = [(d.log() - t.log().mean()) / t.log().std() for d, t in pairs]
    rules = {
        "sum": maps[:scales],
        "calibrated sum: d / mean": [d / t.mean() for d, t in pairs[:scales]],
        "calibrated sum: (d - mean) / std": [(d - t.mean()) / t.std() for d, t in pairs[:scales]],
        "log-sum": logs[:scales],
        "calibrated log-sum: (log d - mean) / std": calibrated[:scales],
        "the same of the likelihoods": calibrated[scales:],
        "the same of distances and likelihoods": calibrated,
        "the same of distances and the coarsest likelihood": [*calibrated[:scales], calibrated[-1]],
    }
    if scales == 3:
        rules["log-sum weighted 2 : 3 : 1"] = [w * d for w, d in zip((2, 3, 1), logs, strict=False)]
    height, width = maps[0].shape[-2:]
    for rule, parts in rules.items():
        yield rule, torch.stack([resize(part, height, width) for part in parts]).sum(dim=0)


def readings(maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Read image scores of shape ``(N,)`` off fused maps of shape ``(N, 1, h, w)``."""
    pixels = maps.flatten(1)
    highest = pixels.sort(dim=1, descending=True)[0]
    count = pixels.shape[1]
    return {
        "mean": pixels.mean(dim=1),
        "max": highest[:, 0],
        "top 5 %": highest[:, : count // 20].mean(dim=1),
        "top 1 %": highest[:, : count // 100].mean(dim=1),
        "top 0.5 %": highest[:, : max(1, count // 200)].mean(dim=1),
    }


def compare(measured: dict[str, Any]) -> pd.DataFrame:
    """Return image AUROC of every rule and reading, and pixel AUROC (on every second row and column) of every rule."""
    rows = []
    for chosen in ((0, 1), (1, 2), (0, 1, 2)):
        indices = [*chosen, *(scale + len(LAYERS) for scale in chosen)]
        maps, train = ([measured[split][index] for index in indices] for split in ("test", "train"))
        for rule, fused in fusions(maps, train):
            scores = {name: roc_auc_score(measured["labels"], score) for name, score in readings(fused).items()}
            pixels = resize(fused, *measured["masks"].shape[-2:])[:, 0, ::2, ::2]
            scores["pixel"] = roc_auc_score(measured["masks"][:, ::2, ::2].flatten(), pixels.flatten())
            rows += [
                {
                    "layers": ", ".join(LAYERS[scale] for scale in chosen),
                    "rule": rule,
                    "score": name,
                    "auroc": 100 * auroc,
                }
                for name, auroc in scores.items()
            ]
    return pd.DataFrame(rows)


def false_alarms(measured: dict[str, Any], rates: Sequence[float]) -> pd.DataFrame:
    """Count the good test images above the thresholds of held-out images, scored by two scales and the likelihood.

    For comparison the thresholds of the images that were trained on, which are too low.
    """
    maps = {split: [measured[split][index] for index in (0, 1, 4)] for split in ("train", "held_out", "test")}
    generator = AnomalyMapGenerator([1, 1, 1], calibration=True, image_score="topk")
    generator.fit([maps["train"]])
    scores = {split: generator(values, (256, 256)).pred_score.flatten() for split, values in maps.items()}
    good = scores["test"][measured["labels"] == 0]
    rows = []
    for rate in rates:
        row: dict[str, Any] = {"rate": rate, "good": len(good)}
        for split in ("held_out", "train"):
            post_processor = RankPreservingPostProcessor(false_alarm_rate=rate)
            post_processor.normal_image_scores = sorted(scores[split].tolist())
            row |= {split: len(scores[split]), f"alarms, {split}": int((good > post_processor.image_threshold).sum())}
        rows.append(row | {"rank": conformal_rank(row["held_out"], rate)})
    return pd.DataFrame(rows)


def expected_alarms(counts: pd.DataFrame) -> str:
    """Return the range of the total number of false alarms that holds with 95 % if each rate is as asked for.

    A threshold that is the k-th smallest of n scores has a false-alarm rate of Beta(n + 1 - k, k), and hence a
    beta-binomial number of false alarms.
    """
    probabilities = np.ones(1)
    for row in counts.itertuples():
        alarms = betabinom(row.good, row.held_out + 1 - row.rank, row.rank)
        probabilities = np.convolve(probabilities, alarms.pmf(np.arange(row.good + 1)))
    below = probabilities.cumsum()
    return f"{np.searchsorted(below, 0.025)} to {np.searchsorted(below, 0.975)}"


def needed_images(rates: Sequence[float]) -> pd.DataFrame:
    """Return how many held-out images each rate needs, and how far the rate of a single threshold may be off."""
    rows = []
    for rate in rates:
        fewest = fewest_scores(rate)
        row = {"rate asked for": f"{rate:.1%}", "held-out images needed": fewest}
        for name, count in (("with as many", fewest), ("with four times as many", 4 * fewest)):
            rank = conformal_rank(count, rate)
            low, high = beta(count + 1 - rank, rank).ppf([0.1, 0.9])
            row[f"80 % of thresholds, {name}"] = f"{low:.1%} to {high:.1%}"
        rows.append(row)
    return pd.DataFrame(rows)


def spread(comparison: pd.DataFrame, columns: str) -> str:
    """Return a table of the mean and the standard deviation over seeds, a row for each fusion."""
    keys = ["layers", "rule"]
    seeds = comparison.pivot_table(index=[*keys, "seed"], columns=columns, values="auroc", sort=False)
    if columns == "category":
        seeds["mean"] = seeds.mean(axis=1)
    groups = seeds.groupby(keys, sort=False)
    table = groups.mean().map("{:.1f}".format) + " ± " + groups.std().map("{:.1f}".format)
    return table.reset_index().to_markdown(index=False)


def main(
    root: Path,
    categories: Sequence[str] = ("bottle", "grid", "screw"),
    seeds: Sequence[int] = (0, 1, 2),
    val_split_ratio: float = 0.2,
    rates: Sequence[float] = (0.025, 0.05, 0.1, 0.2),
    results_dir: Path = Path("results/fusion"),
) -> None:
    """Write and print the tables; trainings that an earlier call has finished are kept.

    Args:
        root: Folder of MVTec AD.
        categories: Names of categories.
        seeds: Seeds of training and of the held-out images.
        val_split_ratio: Share of the training images that is held out.
        rates: Rates of false alarms to ask for.
        results_dir: Folder for the tables, distance maps and checkpoints.
    """
    results_dir.mkdir(parents=True, exist_ok=True)
    comparisons, counts = [], []
    for seed in seeds:
        for category in categories:
            path = results_dir / f"{category}_{val_split_ratio}_{seed}.pt"
            if not path.exists():
                datamodule = MVTec(
                    root=root,
                    category=category,
                    val_split_mode="from_train",
                    val_split_ratio=val_split_ratio,
                    seed=seed,
                )
                torch.save(distances(datamodule, seed, results_dir), path)
            measured = torch.load(path)
            comparisons.append(compare(measured).assign(category=category, seed=seed))
            counts.append(false_alarms(measured, rates).assign(category=category, seed=seed))
    comparison, alarms = pd.concat(comparisons), pd.concat(counts)
    comparison.to_csv(results_dir / "fusion.csv", index=False)
    alarms.to_csv(results_dir / "false_alarms.csv", index=False)

    pixel = comparison["score"] == "pixel"
    print(f"Pixel AUROC\n\n{spread(comparison[pixel], 'category')}\n")  # noqa: T201
    print(f"Image AUROC, mean over the categories\n\n{spread(comparison[~pixel], 'score')}\n")  # noqa: T201
    totals = [
        {
            "rate": rate,
            "seed": seed,
            "good test images": counts["good"].sum(),
            "expected alarms": f"{(counts['good'] * rate).sum():.1f}",
            "95 % range": expected_alarms(counts),
            "alarms, held-out": counts["alarms, held_out"].sum(),
            "alarms, trained on": counts["alarms, train"].sum(),
        }
        for (rate, seed), counts in alarms.groupby(["rate", "seed"])
    ]
    print(f"False alarms over the categories\n\n{pd.DataFrame(totals).to_markdown(index=False)}\n")  # noqa: T201
    print(f"Held-out images\n\n{needed_images(rates).to_markdown(index=False)}")  # noqa: T201


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
