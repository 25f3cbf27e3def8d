"""Encoded pictures to the RGB pixels that trainer and engine see: one function, and the check that it will succeed."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.Image import Transpose

from prism_megatron.errors import UserError

MAX_ASPECT_RATIO = 200  # of Qwen's image processor, which refuses what is longer
_PROGRAMS = ("EPS", "WMF")  # Pillow starts another program to draw them
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
# What the numbers of a grey picture deeper than 8 bits run over; where they leave these, over what is found.
_INTEGER_RANGES = ((0.0, 65535.0),)
_FLOAT_RANGES = ((0.0, 1.0), (0.0, 255.0))


def decode_image(encoded: bytes) -> Image.Image:
    """The first frame as RGB, upright as its EXIF orientation says, on white where it is transparent.

    It has no metadata, so that no one turns it again. ``check_image`` says beforehand whether this succeeds.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        rgb = _rgb(image).copy()
        turn = _TURNS.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return rgb


def check_image(encoded: bytes, source: str) -> tuple[int, int]:
    """Width and height of what ``decode_image`` returns.

    Raises UserError, quoting ``source``, for a picture that cannot be decoded or that no model takes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged metadata, which is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            if image.format in _PROGRAMS:
                raise ValueError(f"{image.format} is a program that draws a picture, convert it to PNG")
            width, height = image.size
            image.draft("L", (1, 1))  # a JPEG is read to its end at an eighth of its size
            _rgb(image)
            upright = _upright(image, (width, height))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as fault:
        raise UserError(f"{source}: {fault}; shrink the picture or drop the row") from fault
    except Exception as fault:  # each of Pillow's formats raises its own for a damaged file
        raise UserError(f"{source}: not a readable image ({fault}); replace the file or drop the row") from fault
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UserError(
            f"{source}: {width} x {height} pixels, the longer side of a picture may be {MAX_ASPECT_RATIO} times the "
            "shorter one; crop it or drop the row"
        )
    return upright


def image_size(encoded: bytes) -> tuple[int, int]:
    """Width and height in pixels of what ``decode_image`` returns."""
    with Image.open(io.BytesIO(encoded)) as image:
        return _upright(image, image.size)


def _upright(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """``size``, as stored in the file, after rotation by the EXIF orientation."""
    sideways = image.format != "TIFF" and _orientation(image) in range(5, 9)  # Pillow turns a TIFF on its own
    return (size[1], size[0]) if sideways else size


def _rgb(image: Image.Image) -> Image.Image:
    """Pixels as RGB. Raises whatever Pillow does for a damaged file."""
    image.load()
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        return _grey(np.asarray(image), _FLOAT_RANGES)
    if image.mode.startswith("I"):
        return _grey(np.asarray(image.convert("I")), _INTEGER_RANGES)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None, "it is not converted in place"
        return converted
    return image.convert("RGB")


def _grey(values: np.ndarray, ranges: tuple[tuple[float, float], ...]) -> Image.Image:
    """A picture of numbers [height, width] that run over the first of ``ranges`` that holds them all."""
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0)
    least, most = float(numbers.min()), float(numbers.max())
    low, high = next(((low, high) for low, high in ranges if low <= least and most <= high), (least, most))
    scaled = (numbers - low) * (255 / (high - low or 1))
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, struct.error, OSError, ValueError, TypeError, KeyError):  # damaged metadata, sound pixels
        return 1
