# SPDX-License-Identifier: Apache-2.0

"""What would lose a training is refused before it begins, and an image that can't be read is named."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback
from PIL import Image

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
"""Lightning's precisions that keep weights, statistics and scores in single precision."""
DEEP = {"F", "I", "I;16", "I;16B", "I;16L", "I;16N"}
"""Modes of pillow whose values anomalib's reader would clip at 255."""


class Preflight(Callback):
    """Checks precision and images before any work is done, and names the file behind a reader's error."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check what is known before the first image is looked at.

        Raises:
            ValueError: If the precision isn't one of :data:`PRECISIONS`, or a training would find no validation images
                to set its thresholds.
            OSError: If a validation image, which is needed only after the last step, can't be read, or an image has
                more than 8 bits a channel, of which anomalib would silently clip most.
        """
        del pl_module  # Unused argument.
        if trainer.precision not in PRECISIONS:
            msg = f"precision must be one of {', '.join(PRECISIONS)}, got {trainer.precision}."
            raise ValueError(msg)
        datamodule: Any = trainer.datamodule
        names = ("train_data", "val_data", "test_data")
        # Kept, because the feature cache takes the training set's place.
        self.files = [file for name in names for file in _files(getattr(datamodule, name, None))]
        _check_depth(self.files)
        if stage != "fit":
            return
        if isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data"):
            msg = (
                "val_split_mode must be one of 'same_as_test', 'from_test', 'from_train', 'synthetic', because "
                f"validation images set the thresholds; got '{datamodule.val_split_mode.value}'."
            )
            raise ValueError(msg)
        if not trainer.enable_validation:
            msg = (
                "limit_val_batches must be above 0 and a validation dataloader given, because validation images set "
                f"the thresholds; got limit_val_batches={trainer.limit_val_batches}."
            )
            raise ValueError(msg)
        if found := unreadable(_files(getattr(datamodule, "val_data", None))):
            raise OSError(found)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the images to predict.

        Raises:
            OSError: If an image has more than 8 bits a channel.
        """
        del pl_module  # Unused argument.
        _check_depth(_predicted(trainer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the file's name into the error of an image that can't be read, which pillow leaves out."""
        del pl_module  # Unused argument.
        if not isinstance(exception, OSError | SyntaxError):  # pillow raises the latter for a broken PNG
            return
        found = unreadable([*self.files, *_predicted(trainer)])
        if found and found not in str(exception):
            exception.args = (f"{exception}\n{found}",)  # last, where the end of a traceback is read


def check_given(model: type, arguments: Mapping[str, Any]) -> None:
    """Check that no argument is None that must not be: ``null`` in YAML passes anomalib's command line for any type.

    Args:
        model (type): Class of the model.
        arguments (Mapping[str, Any]): Arguments of its constructor.

    Raises:
        ValueError: If one is.
    """
    for name, parameter in inspect.signature(model).parameters.items():
        wanted = inspect.formatannotation(parameter.annotation)
        if name in arguments and arguments[name] is None and "None" not in wanted:
            msg = f"{name} must be of type {wanted}, got None."
            raise ValueError(msg)


def unreadable(files: Iterable[str]) -> str:
    """Look for a file that isn't a whole image.

    Args:
        files (Iterable[str]): Files.

    Returns:
        str: A sentence that names the first such file; empty if there is none.
    """
    return _first(_error_of, files)


def _first(error_of: Callable[[str], str], files: Iterable[str]) -> str:
    """Return the first error of files, empty if there is none."""
    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(error_of, files)), "")


def _check_depth(files: Iterable[str]) -> None:
    """Refuse images whose values anomalib's reader would clip."""
    if found := _first(_error_of_depth, files):
        raise OSError(found)


def _error_of_depth(file: str) -> str:
    """Look at a file's header only; what isn't an image at all is left to its reader."""
    try:
        with Image.open(file) as image:
            mode = image.mode
    except (OSError, SyntaxError):
        return ""
    if mode in DEEP:
        return f"The image {file} must have 8 bits a channel, got pillow's mode {mode}: scale its values to 0 to 255."
    return ""


def _error_of(file: str) -> str:
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        return f"The image {file} can't be read: {error}."
    return ""


def _predicted(trainer: Any) -> Iterator[str]:
    """Yield the files that the trainer predicts."""
    loaders = trainer.predict_dataloaders
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        yield from _files(getattr(loader, "dataset", None))


def _files(dataset: Any) -> Iterator[str]:
    """Yield the files of images and masks of one of anomalib's data sets."""
    samples = getattr(dataset, "samples", None)
    if samples is None:
        yield from map(str, getattr(dataset, "image_filenames", []))
        return
    for column in ("image_path", "mask_path"):
        yield from (str(file) for file in samples.get(column, ()) if file)
