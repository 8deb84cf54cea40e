"""Images of every format, depth and orientation as 8-bit pixels."""

import os
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, features

from stratavit import StrataViTError, image_loader
from stratavit.data.image_reading import decoded, endings, open_image

SIDE = 16
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)


def read(path, mode="RGB"):
    with open_image(str(path)) as image:
        return decoded(image, mode, str(path))


# ---- formats ----------------------------------------------------------------------------------------------------

FORMATS = ["bmp", "gif", "JPG", "jfif", "png", "tif", "webp", "avif", "jp2", "ppm", "pbm", "tga", "ico", "qoi"]
OPTIONAL = {"avif": "avif", "webp": "webp", "jp2": "jpg_2000"}


@pytest.mark.parametrize("ending", FORMATS)
def test_formats_that_pillow_reads(tmp_path, ending):
    """Written and read again: the color is still there, within what the format loses."""
    if ending in OPTIONAL and not features.check(OPTIONAL[ending]):
        pytest.skip(f"this Pillow has no {ending}")
    mode, value = ("1", 1) if ending == "pbm" else ("RGB", (200, 100, 50))
    plain = Image.new(mode, (SIDE, SIDE), value)
    plain.save(tmp_path / f"0.{ending}")
    assert f".{ending.lower()}" in endings()
    found = np.asarray(read(tmp_path / f"0.{ending}")).mean((0, 1))
    assert found == pytest.approx(np.asarray(plain.convert("RGB")).mean((0, 1)), abs=2)


def test_programs_and_stubs_are_no_images():
    assert not endings() & {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".grib", ".bufr", ".mpg", ".svg", ".txt"}


def test_the_first_frame_of_several(tmp_path):
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "blue")]
    for ending in ("gif", "tif", "png"):
        frames[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=frames[1:])
        red, _, blue = read(tmp_path / f"0.{ending}").getpixel((8, 8))
        assert red > 200 > 50 > blue


# ---- more than 8 bits -------------------------------------------------------------------------------------------

DEEP = {
    "16 bits as PNG": ("png", (RAMP * 65535).astype(np.uint16)),
    "16 bits as TIFF": ("tif", (RAMP * 65535).astype(np.uint16)),
    "16 bits as PGM": ("pgm", (RAMP * 65535).astype(np.uint16)),
    "I as TIFF": ("tif", (RAMP * 65535).astype(np.int32)),
    "F as TIFF": ("tif", RAMP.astype(np.float32)),
    "F as PFM": ("pfm", RAMP.astype(np.float32)),
    "black I": ("tif", np.zeros((SIDE, SIDE), np.int32)),
    "dark 16 bits": ("png", (RAMP * 200).astype(np.uint16)),  # as dark as it says, not stretched
}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", DEEP)
def test_more_bits_are_scaled_by_their_type(tmp_path, name, mode):
    ending, pixels = DEEP[name]
    try:
        Image.fromarray(pixels).save(tmp_path / f"0.{ending}")
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    expected = pixels.astype(np.float64) / (1 if pixels.dtype.kind == "f" else 65535)
    for channel in read(tmp_path / f"0.{ending}", mode).split():
        assert np.abs(np.asarray(channel) / 255 - expected).max() <= 0.51 / 255


@pytest.mark.parametrize(
    "pixels",
    [
        (RAMP * 255).astype(np.int32),  # of 8 bits, or very dark
        (RAMP * 70000).astype(np.int32),
        (RAMP * 1000).astype(np.int32) - 1000,  # as of a scanner
        (RAMP * 255).astype(np.float32),
        (RAMP - 0.5).astype(np.float32),
        np.full((SIDE, SIDE), np.nan, np.float32),
    ],
)
def test_numbers_of_which_nothing_says_what_is_white_are_refused(tmp_path, pixels):
    """Also by a loader, which leaves out damaged images only."""
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "val" / "a" / "0.tif")
    with pytest.raises(StrataViTError, match=r"0\.tif holds .* white"):
        next(iter(image_loader(tmp_path, {"input_size": (3, SIDE, SIDE)}, "val", None)))


TIFFS = {  # bits, kind of numbers (1 without a sign, 2 with, 3 floats), whether 0 is white, bytes, lightness
    "white is 0, 16 bits": (16, 1, True, (65535 - RAMP * 65535).astype("<u2").tobytes(), RAMP),
    "white is 0, 8 bits": (8, 1, True, (255 - RAMP * 255).astype("u1").tobytes(), RAMP),
    "white is 0, floats": (32, 3, True, (1 - RAMP).astype("<f4").tobytes(), RAMP),
    "with a sign": (16, 2, False, (RAMP * 32767).astype("<i2").tobytes(), RAMP),
    "dark with a sign": (16, 2, False, (RAMP * 200).astype("<i2").tobytes(), RAMP * 200 / 32767),
    "12 bits, black": (12, 1, False, bytes(SIDE * SIDE * 3 // 2), RAMP * 0),
    "12 bits, white": (12, 1, False, b"\xff" * (SIDE * SIDE * 3 // 2), RAMP * 0 + 1),
}


@pytest.mark.parametrize("name", TIFFS)
def test_what_a_tiff_says_of_its_numbers(tmp_path, name):
    bits, kind, zero_is_white, content, lightness = TIFFS[name]
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: not zero_is_white, 273: 8, 277: 1, 278: SIDE}
    tags |= {279: len(content), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    (tmp_path / "0.tif").write_bytes(head + content + struct.pack("<H", len(tags)) + entries + bytes(4))
    found = np.asarray(read(tmp_path / "0.tif", "L")) / 255
    assert np.abs(found - lightness).max() <= 1.01 / 255


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(OSError, match="not a regular file"):
        read(tmp_path / "0.png")


# ---- modes ------------------------------------------------------------------------------------------------------


COLOR = Image.new("RGB", (SIDE, SIDE), (200, 100, 50))
PALETTE = COLOR.quantize(4)
INDEX = PALETTE.getpixel((0, 0))
MODES = {
    "RGBA": (Image.new("RGBA", (SIDE, SIDE), (200, 100, 50, 0)), {}, "png"),
    "P, transparent": (PALETTE, {"transparency": INDEX}, "png"),
    "P, half transparent": (PALETTE, {"transparency": bytes([0] * (INDEX + 1))}, "png"),
    "RGB, one color transparent": (COLOR, {"transparency": (200, 100, 50)}, "png"),
    "LA": (Image.new("LA", (SIDE, SIDE), (90, 0)), {}, "png"),
    "1": (Image.new("1", (SIDE, SIDE), 1), {}, "png"),
    "CMYK": (COLOR.convert("CMYK"), {}, "tif"),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", MODES)
@pytest.mark.filterwarnings("error")
def test_modes_are_shown_as_timm_shows_them(tmp_path, name, mode):
    """Transparency is dropped: what timm trained its models on."""
    picture, options, ending = MODES[name]
    picture.save(tmp_path / f"0.{ending}", **options)
    found = read(tmp_path / f"0.{ending}", mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(tmp_path / f"0.{ending}").convert(mode)
    assert found.mode == mode
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert np.asarray(found).max() > 40


# ---- orientation ------------------------------------------------------------------------------------------------

TURNS = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation, ending):
    """As browsers show them, not as they lie in the file."""
    quarters = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    quarters[: SIDE // 2, :SIDE] = (255, 0, 0)
    quarters[SIDE // 2 :, SIDE:] = (0, 255, 0)
    stored, exif = Image.fromarray(quarters), Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"0.{ending}", exif=exif, **({} if ending in ("png", "tif") else {"quality": 100}))
    turn = TURNS[orientation - 1]
    expected = stored if turn is None else stored.transpose(Image.Transpose[turn])
    found = read(tmp_path / f"0.{ending}")
    assert found.size == expected.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 20


def test_16_bits_are_upright_too(tmp_path):
    exif, pixels = Image.Exif(), (RAMP * 65535).astype(np.uint16)
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    assert np.asarray(read(tmp_path / "0.png", "L"))[0, 0] == 255


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"\0", b"MM\0*\0\0\xff\xff", b"II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_damaged_exif_data_spoil_no_image(tmp_path, exif):
    plain = Image.new("RGB", (SIDE, SIDE), (200, 100, 50))
    plain.save(tmp_path / "0.jpg", exif=b"Exif\0\0" + exif, quality=100)
    assert read(tmp_path / "0.jpg").getpixel((0, 0))[0] > 190
