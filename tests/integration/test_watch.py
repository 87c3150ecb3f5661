# SPDX-License-Identifier: Apache-2.0

"""An exported model on a line: ``python -m anomalib_dhkd watch``."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import openvino as ov
import pytest
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.visualization.image import visualize_anomaly_map
from PIL import Image

from anomalib_dhkd import Dhkd, Quickstart
from anomalib_dhkd.watch import watch
from tests.helpers import PATIENCE, fit, small_dhkd

pytestmark = pytest.mark.no_cover  # the models are exported first


class Exported(NamedTuple):
    """A small model, its exported file, and images of its size: RGB, some of which have a defect."""

    model: Dhkd
    path: Path
    images: list[np.ndarray]


@pytest.fixture(scope="module")
def exported(quickstart_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    data = Quickstart(root=quickstart_root, num_train=8, num_test=2, train_batch_size=4, num_workers=0)
    model = small_dhkd(train_steps=8)
    engine, _ = fit(data, folder, model)
    model.post_processor.image_sensitivity = 0.4  # the threshold becomes 0.6
    path = engine.export(model, ExportType.OPENVINO, export_root=folder)
    images = []
    for file in data.test_data.samples.image_path:
        image = np.asarray(Image.open(file).convert("RGB").resize((64, 64)))
        images.append(image // np.array([1, 2, 3], dtype=np.uint8))  # not grey: swapped colours must be seen
    return Exported(model.eval(), path, images)


@pytest.fixture
def source(exported: Exported, tmp_path: Path) -> Path:
    """A folder with four images in two folders, two of the same name."""
    folder = tmp_path / "source"
    for name, image in zip(("a/000.png", "a/001.png", "b/000.png", "b/000.bmp"), exported.images[-4:], strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


def _lines(output: Path) -> list[dict[str, Any]]:
    """Return the complete lines."""
    text = output.read_text() if output.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _wait(until: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def _watch(count: int, exported: Exported, source: Path, output: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Watch in this process, end it by a signal after some lines, and return the lines by file."""
    ended = threading.Event()

    def end() -> None:
        while not ended.wait(0.05):
            if len(_lines(output)) >= count:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the signal come after the end
    thread = threading.Thread(target=end)
    thread.start()
    try:
        watch(exported.path, source, output, settle=0.1, **options)
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    lines = _lines(output)
    assert len({line["file"] for line in lines}) == len(lines)
    return {line["file"]: line for line in lines}


@contextmanager
def _process(exported: Exported, source: Path, output: Path, *options: str) -> Iterator[subprocess.Popen]:
    """Run the command as a user would."""
    command = [sys.executable, "-m", "anomalib_dhkd", "watch", "--model", str(exported.path), "--source", str(source)]
    command += ["--output", str(output), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_verdicts_are_those_of_engine(exported: Exported, tmp_path: Path) -> None:
    source, output, heat_maps = (tmp_path / name for name in ("source", "lines.jsonl", "maps"))
    exif = Image.Exif()
    exif[0x0112] = 3
    for number, array in enumerate(exported.images):
        folder = source / str(number)
        folder.mkdir(parents=True)
        image = Image.fromarray(array)
        image.save(folder / "rgb.png")
        image.save(folder / "rgb.jpg", exif=exif)
        image.convert("L").save(folder / "grey.bmp")
        image.convert("CMYK").save(folder / "cmyk.tif")
        Image.fromarray(np.dstack([array, array[..., 0]])).save(folder / "rgba.png")
        image.quantize(32).save(folder / "palette.PNG")
    lines = _watch(6 * len(exported.images), exported, source, output, heat_maps=heat_maps)

    engine = Engine(default_root_dir=tmp_path / "engine", enable_progress_bar=False)
    predictions = {
        Path(item.image_path).relative_to(source).as_posix(): item
        for batch in engine.predict(model=exported.model, data_path=source)
        for item in batch
    }
    assert lines.keys() == predictions.keys()
    verdicts = set()
    for file, item in predictions.items():
        line = lines[file]
        assert line["score"] == pytest.approx(float(item.pred_score), abs=1e-3), file
        assert line["verdict"] == ("anomalous" if item.pred_label else "normal"), file
        assert (line["verdict"] == "anomalous") == (line["score"] > line["threshold"]), file
        verdicts.add(line["verdict"])
        pixels = np.asarray(Image.open(line["heat_map"]), dtype=int)
        expected = np.asarray(visualize_anomaly_map(item.anomaly_map), dtype=int)
        assert expected.shape == (64, 64, 3)
        assert np.abs(pixels - expected).max() <= 8  # of one grey level
    assert verdicts == {"anomalous", "normal"}
    assert {line["threshold"] for line in lines.values()} == {0.6}
    assert {line["heat_map"] for line in lines.values()} == {str(file) for file in heat_maps.rglob("*.png")}
    assert lines["0/palette.PNG"]["heat_map"] == str(heat_maps / "0" / "palette.PNG.png")
    assert lines["0/rgba.png"]["note"] == "RGBA converted to RGB; alpha dropped"
    assert lines["0/rgb.jpg"]["note"] == "EXIF orientation 3 not applied, as in training"
    assert "note" not in lines["0/rgb.png"]


def test_16_bit_files_have_the_score_of_8_bit_ones(exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, image in enumerate(exported.images[:4]):
        Image.fromarray(image[..., 0]).save(source / f"{number}_8.png")
        cv2.imwrite(str(source / f"{number}_16.png"), image[..., 0].astype(np.uint16) * 257)
    lines = _watch(8, exported, source, tmp_path / "lines.jsonl")
    scores = [(lines[f"{number}_16.png"]["score"], lines[f"{number}_8.png"]["score"]) for number in range(4)]
    assert len(set(scores)) == 4
    assert all(deep == pytest.approx(ordinary, abs=1e-4) for deep, ordinary in scores)
    assert lines["0_16.png"]["note"] == "grey repeated in three channels; 16 bits divided by 65535"


def test_a_broken_file_is_a_line_with_its_error(exported: Exported, source: Path, tmp_path: Path) -> None:
    (source / "a" / "empty.png").touch()
    whole = (source / "a" / "000.png").read_bytes()
    (source / "a" / "short.png").write_bytes(whole[: len(whole) // 2])
    (source / "a" / "text.jpg").write_text("no image")
    Image.fromarray(exported.images[0][..., 0] / np.float32(255)).save(source / "a" / "float.tif")
    (source / "a" / "notes.txt").write_text("no image either, and not named as one")
    lines = _watch(8, exported, source, tmp_path / "lines.jsonl")
    errors = {file: line["error"] for file, line in lines.items() if "error" in line}
    assert errors.keys() == {"a/empty.png", "a/short.png", "a/text.jpg", "a/float.tif"}
    assert errors["a/empty.png"].startswith("UnidentifiedImageError: cannot identify image file")
    assert "truncated" in errors["a/short.png"]
    assert errors["a/float.tif"].startswith("ValueError: The image holds floating-point numbers")
    assert len(lines) == 8
    assert all(("score" in line) != ("error" in line) for line in lines.values())


def test_a_model_of_fixed_size_refuses_others_by_name(exported: Exported, source: Path, tmp_path: Path) -> None:
    model = ov.Core().read_model(exported.path)
    model.reshape([1, 3, 64, 64])
    fixed = tmp_path / "fixed.xml"
    ov.save_model(model, fixed, compress_to_fp16=True)  # the threshold, too, is in half precision
    Image.new("RGB", (80, 64)).save(source / "wide.png")
    lines = _watch(5, exported._replace(path=fixed), source, tmp_path / "lines.jsonl")
    expected = "ValueError: The image is 64 pixels high and 80 wide, the model takes [1,3,64,64]."
    assert lines.pop("wide.png")["error"] == expected
    assert all("score" in line and line["threshold"] == pytest.approx(0.6, abs=1e-3) for line in lines.values())


def test_command_watches_ends_and_goes_on(exported: Exported, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "lines.jsonl"
    with _process(exported, source, output, "--settle=1.5") as process:
        _wait(lambda: len(_lines(output)) == 4, process)
        # A new folder, and in it a file that is written slowly.
        content = (source / "a" / "000.png").read_bytes()
        (source / "c").mkdir()
        with (source / "c" / "slow.png").open("wb") as file:
            for start in range(0, len(content), len(content) // 8):
                file.write(content[start : start + len(content) // 8])
                file.flush()
                time.sleep(0.15)
        _wait(lambda: len(_lines(output)) == 5, process)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, text
    told = re.sub(r"\s+(watch.py:\d+)?\s*", " ", text)
    assert "Ended after 5 images" in told
    assert "change detected" not in told
    lines = _lines(output)
    assert lines[-1]["file"] == "c/slow.png"
    assert lines[-1]["score"] == next(line["score"] for line in lines if line["file"] == "a/000.png")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}[+-]\d\d:\d\d", lines[0]["time"])
    assert re.fullmatch("[0-9a-f]{12}", lines[0]["model"])

    shutil.copy(source / "b" / "000.png", source / "b" / "001.png")
    os.utime(source / "a" / "001.png")  # written anew
    with _process(exported, source, output) as process:
        _wait(lambda: len(_lines(output)) >= 7, process)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, text
    assert [line["file"] for line in _lines(output)[:5]] == [line["file"] for line in lines]
    assert sorted(line["file"] for line in _lines(output)[5:]) == ["a/001.png", "b/001.png"]


def test_command_ends_and_is_killed_amid_work(exported: Exported, source: Path, tmp_path: Path) -> None:
    output, heat_maps = tmp_path / "lines.jsonl", tmp_path / "maps"
    for number in range(800):
        (source / f"{number:04}.png").symlink_to(source / "a" / "000.png")
    options = ["--heat_maps", str(heat_maps)]
    with _process(exported, source, output, *options) as process:
        _wait(lambda: len(_lines(output)) > 10, process)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, text
    ended = len(_lines(output))
    assert ended < 804
    assert output.read_bytes().endswith(b"\n")
    assert {line["heat_map"] for line in _lines(output)} == {str(file) for file in heat_maps.rglob("*.png")}

    with _process(exported, source, output, *options) as process:
        _wait(lambda: len(_lines(output)) > ended + 10, process)
        process.kill()
        process.communicate()
    killed = len(_lines(output))
    assert ended < killed < 804
    with output.open("rb+") as file:  # as if it had been killed amid a line
        file.seek(-30, os.SEEK_END)
        file.truncate()

    with _process(exported, source, output, *options) as process:
        _wait(lambda: len(_lines(output)) >= 804, process)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, text
    assert "half-written; its image is done again" in re.sub(r"\s+(watch.py:\d+)?\s*", " ", text)
    lines = _lines(output)
    assert len(lines) == len({line["file"] for line in lines}) == 804


def test_frames_of_a_video_have_the_scores_of_files(exported: Exported, tmp_path: Path) -> None:
    video, source, output = tmp_path / "line.avi", tmp_path / "source", tmp_path / "video.jsonl"
    source.mkdir()
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 64))  # without loss
    for number, image in enumerate(exported.images):
        Image.fromarray(image).save(source / f"{number}.png")
        Image.fromarray(image[..., ::-1]).save(source / f"{number}_swapped.png")
        writer.write(image[..., ::-1])
    writer.release()
    files = _watch(2 * len(exported.images), exported, source, tmp_path / "files.jsonl")
    frames = _watch(10**6, exported, video, output, heat_maps=tmp_path / "maps")  # ends with the video
    assert len(frames) == len(exported.images)
    differences = []
    for number in range(len(exported.images)):
        line = frames[f"line.avi/{number:06}"]
        assert line["score"] == pytest.approx(files[f"{number}.png"]["score"], abs=1e-4)
        assert line["heat_map"] == str(tmp_path / "maps" / "line.avi" / f"{number:06}.png")
        differences.append(abs(line["score"] - files[f"{number}_swapped.png"]["score"]))
    assert max(differences) > 1e-2
    # The same video again: each frame has its line.
    assert _watch(10**6, exported, video, output) == frames


def test_what_is_wrong_is_said_before_work_begins(exported: Exported, source: Path, tmp_path: Path) -> None:
    no_bin = tmp_path / "model.xml"
    shutil.copy(exported.path, no_bin)
    other = tmp_path / "other.jsonl"
    other.write_text('{"time": "now", "file": "a"}\nno line of ours\n')
    text = tmp_path / "notes.txt"
    text.write_text("not to be cut")
    arguments: dict[str, Any] = {"model": exported.path, "source": source, "output": tmp_path / "lines.jsonl"}
    for changes, message in [
        ({"model": no_bin}, "model must be an OpenVINO file (.xml) with its .bin beside it"),
        ({"model": tmp_path / "none.xml"}, "model must be an OpenVINO file (.xml)"),
        ({"source": tmp_path / "none"}, "source must be a folder, a video or the index of a camera"),
        ({"source": text}, "source must be a folder, camera or video that can be read"),
        ({"source": 99}, "source must be a folder, camera or video that can be read; 99 gives no image 0"),
        ({"heat_maps": source / "maps"}, "heat_maps must not be below source"),
        ({"output": other}, f"output must be a new file or one that this command wrote, got {other}, see line 2"),
        ({"output": text}, f"output must be a new file or one that this command wrote, got {text}"),
        ({"settle": -1}, "settle must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            watch(**(arguments | changes))
    assert text.read_text() == "not to be cut"
    assert _lines(arguments["output"]) == []


def test_precision_is_what_was_asked_for_or_refused(exported: Exported, source: Path, tmp_path: Path) -> None:
    half = Engine(default_root_dir=tmp_path).export(
        exported.model, ExportType.OPENVINO, tmp_path, compression_type=CompressionType.FP16
    )
    for precision in ("f16", "bf16"):
        with pytest.raises(ValueError, match=f"precision must be f32 for .*, got {precision}. Export it with"):
            _watch(4, exported, source, tmp_path / "f32.jsonl", precision=precision)
        compiled = ov.Core().compile_model(half, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        output = tmp_path / f"{precision}.jsonl"
        if got == precision:
            assert len(_watch(4, exported._replace(path=half), source, output, precision=precision)) == 4
        else:
            message = f"precision {precision} can't be had on CPU, which would compute in {got}"
            with pytest.raises(ValueError, match=message):
                _watch(4, exported._replace(path=half), source, output, precision=precision)


def test_what_cannot_be_written_ends_it(exported: Exported, source: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a").touch()  # where a folder must be
    with pytest.raises(FileExistsError):
        _watch(10**6, exported, source, tmp_path / "lines.jsonl", heat_maps=tmp_path / "maps")


def test_a_folder_that_goes_ends_it(exported: Exported, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"

    def remove() -> None:
        _wait(lambda: len(_lines(output)) == 4)
        source.rename(tmp_path / "gone")

    thread = threading.Thread(target=remove)
    thread.start()
    with pytest.raises(FileNotFoundError, match="source is gone"):
        _watch(10**6, exported, source, output)
    thread.join()


@pytest.mark.slow
def test_throughput_beside_benchmark_app(exported: Exported, source: Path) -> None:
    command = [sys.executable, "-m", "anomalib_dhkd.benchmark.throughput", "--model", str(exported.path)]
    command += ["--source", str(source), "--images", "60", "--seconds", "1", "--rounds", "1"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    apps, watches, ratio = map(float, re.findall(r"median: .*?([\d.]+),.*?([\d.]+) images.* ratio ([\d.]+)", output)[0])
    assert ratio == pytest.approx(watches / apps, abs=2e-3)
