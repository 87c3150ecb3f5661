# SPDX-License-Identifier: Apache-2.0

"""MVTec AD under the name that anomalib's command line used to know."""

from anomalib.data import MVTecAD
from torchvision.datasets.folder import IMG_EXTENSIONS


class MVTec(MVTecAD):
    """The same as ``anomalib.data.MVTecAD``; its being imported makes ``--data MVTec`` resolve."""

    def setup(self, stage: str | None = None) -> None:
        """Set up the data sets.

        Args:
            stage (str | None): Lightning's stage. Defaults to ``None``.

        Raises:
            ValueError: If there is no mask of an image with a defect.
        """
        folder = self.root / self.category
        without = [
            image
            for image in sorted(folder.glob("test/*/*"))
            if image.suffix in IMG_EXTENSIONS
            and image.parent.name != "good"
            and not any((folder / "ground_truth" / image.parent.name).glob(f"{image.stem}*"))
        ]
        if without:
            msg = (
                f"MVTec needs a mask of each test image with a defect, and {len(without)} have none: {without[0]} is "
                "the first. The data module Folder without mask_dir does without masks."
            )
            raise ValueError(msg)
        super().setup(stage)
