"""Pixels that trainer and engine see of a picture, and which pictures are refused."""

from __future__ import annotations

import random
import struct
import zlib
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from prism_megatron.data.dataset import read_rlvr, read_sft
from prism_megatron.data.images import check_image, decode_image, image_size
from prism_megatron.errors import UserError

SIDEWAYS = 6


def scene(width: int = 80, height: int = 60) -> Image.Image:
    """Something with no symmetry, no even surface, and every brightness."""
    noise = random.Random(1).randbytes(20 * 15 * 3)
    return Image.frombytes("RGB", (20, 15), noise).resize((width, height), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


# Orientation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(made: Any, form: str, orientation: int) -> None:
    encoded = made.encoded(scene(), form, exif=exif(orientation), **({"lossless": True} if form == "WEBP" else {}))
    check_image(encoded, "x")
    pixels = decode_image(encoded)
    assert image_size(encoded) == pixels.size == ((60, 80) if orientation > 4 else (80, 60))
    expected = ImageOps.exif_transpose(Image.open(made.file(encoded, "x"))).convert("RGB")
    assert pixels.tobytes() == expected.tobytes()
    assert not pixels.info
    assert ImageOps.exif_transpose(pixels).tobytes() == pixels.tobytes()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_says_nothing(made: Any, orientation: Any) -> None:
    encoded = made.encoded(scene(), "JPEG", exif=exif(orientation))
    assert decode_image(encoded).size == image_size(encoded) == (80, 60)


def test_damaged_metadata_does_not_matter(made: Any) -> None:
    encoded = made.encoded(scene(), "JPEG", exif=exif(SIDEWAYS))
    start = encoded.index(b"Exif")
    for position in range(start, start + 32):
        damaged = encoded[:position] + b"\xff" + encoded[position + 1 :]
        check_image(damaged, "x")
        assert decode_image(damaged).size == image_size(damaged)


# Modes ----------------------------------------------------------------------------------------------------------------


def drawing(mode: str) -> Image.Image:
    """Black lines on nothing: what is transparent is black below."""
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 0, 14, 40))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("TIFF", "LA")]
)
def test_what_is_transparent_is_white(made: Any, form: str, mode: str) -> None:
    encoded = made.encoded(drawing(mode), form, **({"lossless": True} if form == "WEBP" else {}))
    check_image(encoded, "x")
    pixels = array(decode_image(encoded))
    assert (pixels[:, 20:] == 255).all()
    assert (pixels[:, 10:14] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"image": Image.new("L", (8, 8), 30), "form": "PNG", "transparency": 30},
        {"image": Image.new("RGB", (8, 8), (1, 2, 3)), "form": "PNG", "transparency": (1, 2, 3)},
        {"image": Image.new("1", (8, 8), 0), "form": "PNG", "transparency": 0},
        {"image": Image.new("P", (8, 8), 3), "form": "GIF", "transparency": 3},
    ],
    ids=["grey", "colour", "bit", "palette"],
)
def test_a_colour_that_stands_for_nothing_is_white(made: Any, options: dict[str, Any]) -> None:
    encoded = made.encoded(**options)
    check_image(encoded, "x")
    assert (array(decode_image(encoded)) == 255).all()


def test_half_transparent_colours_are_mixed_with_white(made: Any) -> None:
    encoded = made.encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 128)))
    assert abs(array(decode_image(encoded))[0, 0] - [227, 127, 127]).max() <= 1


def lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *(("PNG", mode) for mode in ("L", "P", "RGB")),
        *(("TIFF", mode) for mode in ("CMYK", "YCbCr", "LAB", "RGB")),
        *(
            ("JPEG", "CMYK"),
            ("JPEG", "L"),
            ("GIF", "P"),
            ("BMP", "RGB"),
            ("PPM", "RGB"),
            ("WEBP", "RGB"),
            ("ICO", "RGB"),
        ),
        *(("JPEG2000", "RGB"), ("TGA", "RGB"), ("DDS", "RGB"), ("AVIF", "RGB")),
    ],
)
def test_every_ordinary_mode_looks_as_it_did(made: Any, form: str, mode: str) -> None:
    image = scene(64, 64)
    encoded = made.encoded(lab(image) if mode == "LAB" else image.convert(mode), form)
    check_image(encoded, "x")
    expected = image.convert("L") if mode == "L" else image
    assert abs(array(decode_image(encoded)) - array(expected.convert("RGB"))).mean() < 16  # a palette of 216 colours


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (np.linspace(0, 65535, 4800).astype(np.uint16), "PNG"),
        (np.linspace(0, 65535, 4800).astype(np.uint16), "TIFF"),
        (np.linspace(0, 65535, 4800).astype(np.int32), "TIFF"),
        (np.linspace(-7e6, 9e6, 4800).astype(np.int32), "TIFF"),
        (np.linspace(0, 1, 4800).astype(np.float32), "TIFF"),
        (np.linspace(0, 255, 4800).astype(np.float32), "TIFF"),
        (np.linspace(-3, 1e5, 4800).astype(np.float32), "TIFF"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}-{value[-1]:g}",
)
def test_deep_grey_keeps_its_shades(made: Any, values: np.ndarray, form: str) -> None:
    encoded = made.encoded(Image.fromarray(values.reshape(60, 80)), form)
    check_image(encoded, "x")
    pixels = array(decode_image(encoded))[..., 0].ravel()
    assert abs(pixels - np.linspace(0, 255, 4800)).max() <= 1


def test_one_bit_and_one_pixel(made: Any) -> None:
    bits = made.encoded(scene().convert("1"))
    assert set(np.unique(array(decode_image(bits)))) == {0, 255}
    for size in ((1, 1), (3, 1), (1, 3), (3, 3), (200, 1)):
        encoded = made.encoded(Image.new("RGB", size, "red"))
        check_image(encoded, "x")
        assert decode_image(encoded).size == size


def test_of_an_animation_the_first_frame(made: Any) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        encoded = made.encoded(frames[0], form, save_all=True, append_images=frames[1:])
        check_image(encoded, "x")
        assert array(decode_image(encoded))[0, 0, 0] > 200


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *(("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("BMP", {}), ("PNG", {}), ("WEBP", {})),
        *(("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("JPEG2000", {})),
    ],
)
def test_cut_off_pictures_are_refused_by_the_reader(made: Any, form: str, options: dict[str, Any]) -> None:
    """A half is always refused; all but two bytes are, unless every pixel is there."""
    noise = Image.frombytes("RGB", (160, 160), random.Random(0).randbytes(3 * 160 * 160))
    whole = made.encoded(noise, form, **options)
    half = made.parquet(made.rlvr(images=[{"bytes": whole[: len(whole) // 2], "path": None}]))
    with pytest.raises(UserError, match=r"data\.parquet, row 0, image 0: not a readable image"):
        read_rlvr(half)
    try:
        check_image(whole[:-2], "x")
    except UserError:
        return
    assert decode_image(whole[:-2]).tobytes() == decode_image(whole).tobytes()


def test_an_error_page_saved_as_a_picture(made: Any) -> None:
    made.file(b"<html><body>404 Not Found</body></html>", "b.png")
    with pytest.raises(UserError, match=r"line 2, image b\.png: not a readable image"):
        read_sft(made.jsonl(made.sft(), made.sft(images=["b.png"])))


def bits(width: int, height: int) -> bytes:
    """A white one-bit PNG of any size, small as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj()
    line = b"\0" + b"\xff" * ((width + 7) // 8)
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (bits(20_000, 20_000), "decompression bomb.*shrink"),
        (bits(10_000, 10_000), "decompression bomb.*shrink"),
        (bits(402, 2), "402 x 2 pixels, the longer side.*200 times"),
        (bits(1, 333), "1 x 333 pixels"),
        (bits(0, 5), "not a readable image|0 x 5 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "EPS is a program"),
    ],
    ids=["beyond the limit", "beyond the warning", "wide", "tall", "empty", "program"],
)
def test_pictures_that_no_model_takes(made: Any, encoded: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"row 0, image 0: .*({message})"):
        read_rlvr(made.parquet(made.rlvr(images=[{"bytes": encoded, "path": None}])))


def test_large_pictures_are_not_refused(made: Any) -> None:
    check_image(bits(6000, 6000), "x")


# How often ------------------------------------------------------------------------------------------------------------


def test_a_picture_of_many_rows_is_read_and_checked_once(made: Any) -> None:
    path = made.jsonl(*[made.sft()] * 50)
    with patch("prism_megatron.data.fields.check_image", wraps=check_image) as checked:
        assert len(list(read_sft(path))) == 50
        assert checked.call_count == 1
    with patch("prism_megatron.data.fields.check_image", wraps=check_image) as checked:
        assert len(list(read_rlvr(made.parquet(*[made.rlvr()] * 50)))) == 50
        assert checked.call_count == 1
