# SPDX-FileCopyrightText: 2026 The TRIPS for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""
Decode image files to 8-bit RGB images, within limits of format and size.

This file does not import siblings or PyTorch, so that decoding processes start fast.
"""

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image


try:  # an extra: the photos of iPhones
    from pillow_heif import register_heif_opener

    register_heif_opener()
    READS_HEIC = True
except ImportError:
    READS_HEIC = False

# The accepted formats and the suffixes of their files.
FORMATS = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "JPEG2000": ("jp2",),
    "AVIF": ("avif",),
    "HEIF": ("heic", "heif"),
}
MAX_PIXELS = 50_000_000  # a 50-megapixel phone photo has 49,939,200
JPEG_SCALES = (1, 2, 4, 8)  # a JPEG is decoded at one of these fractions of its sides

TRANSPOSE_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """
    An image file that cannot be used.

    Args:
        reason (`str`):
            `"empty"`; `"format"`: not one of the accepted formats; `"pixels"`: too many pixels; `"work"`: takes too
            long to decode (only in `modeling_trips.untrusted_images`); `"broken"`: damaged, truncated, or without a
            fixed range of gray values.
        message (`str`): The fault and what is accepted.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return ImageError, (self.reason, str(self))


def open_image(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Open an image file of an accepted format, without its pixels. Other formats raise an [`ImageError`]."""
    formats = [name for name in FORMATS if name != "HEIF" or READS_HEIC]
    try:
        return Image.open(file, formats=formats)
    except Image.UnidentifiedImageError as error:
        message = f"The file is not a whole image of one of the formats {', '.join(formats)}."
        if not READS_HEIC:
            message += " HEIC photos need a package: `pip install pillow-heif`."
        raise ImageError("format", message) from error


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Decode an image file of an accepted format and size.

    The size is checked before any pixel is decoded. A file can still need much more time than its size suggests; see
    `modeling_trips.untrusted_images` for services.

    Args:
        data (`bytes`): Content of a file of one of `FORMATS`. Of an animation, the first frame is decoded.
        max_pixels (`int`, *optional*, defaults to 50,000,000): Largest width times height of the result. Larger
            photos are refused, unless they are JPEGs: these are decoded at a half, a quarter or an eighth of their
            sides. Progressive ones are not, because their decoder needs memory for the whole image.

    Returns:
        `PIL.Image.Image`: The image as [`convert_to_rgb`] returns it.

    Raises:
        [`ImageError`]: The file cannot be used, see its `reason`.
    """
    if not data:
        raise ImageError("empty", "The image file is empty.")
    try:
        with open_image(io.BytesIO(data)) as image:
            width, height = image.size
            is_scalable = image.format in ("JPEG", "MPO") and "progressive" not in image.info
            for scale in JPEG_SCALES if is_scalable else (1,):
                scaled = width // scale, height // scale
                if -(-width // scale) * -(-height // scale) <= max_pixels:
                    break
            else:
                raise ImageError(
                    "pixels",
                    f"The image has {width} x {height} pixels; at most {max_pixels:,} are accepted. Scale it, or save "
                    "it as a JPEG that is not progressive.",
                )
            if scale > 1:
                image.draft(None, scaled)
            return convert_to_rgb(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("pixels", f"The image has too many pixels; at most {max_pixels:,} are accepted.") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise ImageError("broken", f"The image file is broken or cut off: {str(error).rstrip('.')}.") from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """
    Convert an image to 8-bit RGB, upright and opaque. The argument is not changed.

    The EXIF orientation is applied, transparent pixels become white, and 16-bit gray is scaled to 8 bits
    (`round(value / 257)`). An EXIF block that cannot be read counts as upright.

    Args:
        image (`PIL.Image.Image`): Image of any Pillow mode but "I" and "F", of any format but EPS.

    Returns:
        `PIL.Image.Image`: A new image of mode "RGB" without metadata, so that its orientation is not applied again.

    Raises:
        `ValueError`: The image has no pixels; its mode is "I" or "F", which have no fixed range of gray values; or
            its format is EPS, which Pillow decodes by starting Ghostscript.
    """
    if image.format == "EPS":
        raise ValueError("EPS images are not supported. Save the image as a PNG.")
    if 0 in image.size:
        raise ValueError(f"The image has no pixels: its size is {image.size} (width, height).")
    if image.mode in ("I", "F"):
        raise ValueError(
            f'Mode "{image.mode}" has no fixed range of grey values: scale the image to mode "L" (0 to 255) or '
            '"I;16" (0 to 65535).'
        )
    image.load()  # the EXIF block of a PNG may follow its pixels
    if (method := TRANSPOSE_METHODS.get(orientation_of(image))) is not None:
        image = image.transpose(method)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling
        rgb = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        # "La" (premultiplied) is the one mode that Pillow does not convert to "RGBA" in one step
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8. Reads no pixels; an unreadable EXIF block gives 1."""
    try:
        # `getexif` of a PNG would decode the image to find a block at its end.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return orientation if orientation in TRANSPOSE_METHODS else 1
    except Exception:  # any plugin may fail on a damaged block
        return 1
