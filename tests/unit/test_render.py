"""Pictures against the colour science of scikit-image and colorspacious, and against JPEG."""

import ast
import io
import itertools
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
from colorspacious import machado_et_al_2009_matrix
from PIL import Image
from scipy.ndimage import maximum_filter
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.segmentation import find_boundaries

from lvlmva_core.regions import MAX_REGIONS, regions_present
from lvlmva_core.render import (
    COLOUR_NAMES,
    LEAST_DIFFERENCE,
    PALETTE,
    _grown,
    contact_sheet,
    enlarge,
    render_image,
    render_overlay,
    render_segmentation,
    to_png,
)

RGB = np.array([colour.rgb for colour in PALETTE]) / 255


def voronoi(height: int, width: int, n_regions: int, seed: int = 0) -> np.ndarray:
    """Regions nearest to random places, uint8 (H, W)."""
    places = np.random.default_rng(seed).uniform(0, 1, (n_regions, 2)) * [height, width]
    pixels = np.stack(np.mgrid[:height, :width], -1)[:, :, None]
    return ((pixels - places) ** 2).sum(-1).argmin(-1).astype(np.uint8)


def as_seen(rgb: np.ndarray, deficiency: str | None) -> np.ndarray:
    """sRGB colours as people without one kind of cone see them; the simulation is linear in linear RGB."""
    if deficiency is None:
        return rgb
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ machado_et_al_2009_matrix(deficiency, 100).T, 0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("deficiency", [None, "protanomaly", "deuteranomaly", "tritanomaly"])
def test_the_first_eight_colours_differ_for_everyone(deficiency: str | None) -> None:
    lab = rgb2lab(as_seen(RGB[:8], deficiency))
    least = min(float(deltaE_ciede2000(one, other)) for one, other in itertools.combinations(lab, 2))
    assert least >= LEAST_DIFFERENCE


def test_all_colours_differ_and_have_names_of_their_own() -> None:
    lab = rgb2lab(RGB)
    assert min(float(deltaE_ciede2000(one, other)) for one, other in itertools.combinations(lab, 2)) > 20
    assert len(PALETTE) == MAX_REGIONS == len(set(COLOUR_NAMES))


HUES = {"red": 25, "orange": 60, "yellow": 100, "green": 145, "cyan": 200, "blue": 285, "purple": 310, "pink": 0}


@pytest.mark.parametrize("name", HUES)
def test_names_are_honest(name: str) -> None:
    """CIELAB hue angles, in degrees, around which people use these names."""
    _, a, b = rgb2lab(RGB[COLOUR_NAMES.index(name)])
    hue = np.degrees(np.arctan2(b, a))
    distance = {other: abs((hue - angle + 180) % 360 - 180) for other, angle in HUES.items()}
    assert min(distance, key=lambda other: distance[other]) == name or distance[name] < 20


@pytest.mark.parametrize(("shape", "expected"), [((28, 28), 224), ((8, 20), 224), ((224, 300), 224), ((225, 500), 225)])
def test_small_pictures_are_enlarged_by_a_whole_factor(shape: tuple[int, int], expected: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    large = enlarge(image)
    factor = large.shape[0] // shape[0]
    assert min(large.shape) == expected
    np.testing.assert_array_equal(large, np.kron(image, np.ones((factor, factor), dtype=np.uint8)))


def test_images_of_one_and_three_channels() -> None:
    rng = np.random.default_rng(1)
    grey, colour = rng.integers(0, 256, (300, 240), dtype=np.uint8), rng.integers(0, 256, (3, 300, 240), dtype=np.uint8)
    np.testing.assert_array_equal(render_image(grey), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(render_image(grey[None]), render_image(grey))
    np.testing.assert_array_equal(render_image(colour), colour.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="uint8"):
        render_image(grey / 255)
    with pytest.raises(ValueError, match="must be"):
        render_image(colour[:2])


@pytest.mark.parametrize("n_regions", range(1, MAX_REGIONS + 1))
@pytest.mark.parametrize("shape", [(28, 28), (60, 224), (300, 310)])
def test_pixels_away_from_outlines_have_their_region_s_colour(n_regions: int, shape: tuple[int, int]) -> None:
    segments = voronoi(*shape, n_regions)
    picture = render_segmentation(segments, n_regions)
    large = enlarge(segments)
    inner = ~find_boundaries(large, mode="thick")
    for _ in range(max(1, round(min(large.shape) / 112)) + 1):
        inner[1:-1, 1:-1] = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner = ~_spread(~inner)
    expected = np.array([colour.rgb for colour in PALETTE], dtype=np.uint8)[large]
    np.testing.assert_array_equal(picture[inner], expected[inner])


def _spread(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    shifts = [padded[i : i + mask.shape[0], k : k + mask.shape[1]] for i in range(3) for k in range(3)]
    return np.logical_or.reduce(shifts)


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 40])  # the last is wider than the picture
def test_lines_are_widened_as_scipy_widens_them(radius: int) -> None:
    draws = np.random.default_rng(radius)
    for shape in ((1, 1), (1, 7), (9, 4), (30, 31)):
        mask = draws.random(shape) < 0.1
        wanted = maximum_filter(mask, 2 * radius + 1, mode="constant")
        np.testing.assert_array_equal(_grown(mask, radius), wanted)


@pytest.mark.parametrize("quality", [50, 85])
def test_outlines_survive_jpeg_and_down_scaling(quality: int) -> None:
    """Between two regions of nearly one brightness there is still a light line after JPEG and halving."""
    segments = np.zeros((224, 224), dtype=np.uint8)
    segments[:, 112:] = 3
    picture = Image.fromarray(render_segmentation(segments, 4))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    small = np.array(Image.open(buffer).resize((112, 112), Image.Resampling.BILINEAR).convert("L")).astype(int)
    line, left, right = small[:, 54:59].max(1), small[:, 20:48].max(1), small[:, 64:92].max(1)
    assert (line - np.maximum(left, right) > 60).all()


def test_overlay_keeps_the_image_s_brightness_and_leaves_pixels_without_region_grey() -> None:
    image = np.random.default_rng(2).integers(0, 256, (3, 224, 224), dtype=np.uint8)
    segments = np.zeros((224, 224), dtype=np.uint8)
    segments[:100] = 255
    picture = render_overlay(image, segments, 3).astype(float)
    grey = np.array(Image.fromarray(image.transpose(1, 2, 0)).convert("L")).astype(float)
    np.testing.assert_allclose(picture[:90], np.stack([grey[:90]] * 3, axis=-1), atol=1)
    tint = picture[110:] - 0.6 * grey[110:, :, None]
    np.testing.assert_allclose(tint, np.broadcast_to(0.4 * RGB[0] * 255, tint.shape), atol=1.2)
    with pytest.raises(ValueError, match="same height and width"):
        render_overlay(image, segments[:50], 3)


BANDAGES = {"brick": (200, 80, 60), "olive": (122, 122, 62), "denim": (65, 123, 205)}  # of one brightness


@pytest.mark.parametrize("region", range(MAX_REGIONS))
def test_the_colour_overlay_shows_the_colours_of_image_and_region_as_they_are(region: int) -> None:
    """Away from the outlines each pixel is the image's or the region's, in the promised shares."""
    image = np.random.default_rng(3).integers(0, 256, (3, 96, 96), dtype=np.uint8)
    segments = np.full((96, 96), region, np.uint8)
    segments[:24] = 255
    picture = render_overlay(image, segments, style="colour")
    large, own = enlarge(image.transpose(1, 2, 0)), np.array(PALETTE[region].rgb)
    np.testing.assert_array_equal(picture[:64], large[:64])
    below = slice(80, None)
    as_image, as_region = (picture[below] == large[below]).all(-1), (picture[below] == own).all(-1)
    assert (as_image | as_region).all()
    assert as_region.mean() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(("style", "tellable"), [("grey", False), ("colour", True)])
def test_a_bandage_keeps_its_colour_under_every_region(style: Literal["grey", "colour"], tellable: bool) -> None:
    """Bandages of one brightness and several hues, after JPEG: CIEDE2000 between the means of what is no stripe."""
    for region in range(MAX_REGIONS):
        segments = np.full((224, 224), region, np.uint8)
        means = []
        for colour in BANDAGES.values():
            image = np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (3, 224, 224))
            buffer = io.BytesIO()
            Image.fromarray(render_overlay(image, segments, style=style)).save(buffer, format="JPEG", quality=85)
            shown = np.array(Image.open(buffer)) / 255
            from_region = np.abs(shown - RGB[region]).sum(-1)
            means.append(shown[from_region >= np.quantile(from_region, 0.6)].mean(0))
        least = min(deltaE_ciede2000(rgb2lab(a), rgb2lab(b)) for a, b in itertools.combinations(means, 2))
        assert (least >= LEAST_DIFFERENCE) == tellable
        if not tellable:
            assert least < 1.5


def test_on_grey_images_the_grey_overlay_is_what_it_was_and_other_styles_are_refused() -> None:
    image, segments = np.zeros((1, 28, 28), np.uint8), voronoi(28, 28, 3)
    np.testing.assert_array_equal(render_overlay(image, segments), render_overlay(image, segments, style="grey"))
    with pytest.raises(ValueError, match="style 'sepia' is neither 'grey' nor 'colour'"):
        render_overlay(image, segments, style="sepia")  # type: ignore[arg-type]


def test_regions_present() -> None:
    assert regions_present(np.array([[4, 255], [0, 4]], dtype=np.uint8)) == [0, 4]
    assert regions_present(np.full((3, 3), 255, dtype=np.uint8)) == []


def test_regions_that_have_no_colour_are_refused() -> None:
    segments = np.array([[0, 5], [1, 255]], dtype=np.uint8)
    with pytest.raises(ValueError, match="hold region 5, but n_regions = 3"):
        render_segmentation(segments, 3)
    with pytest.raises(ValueError, match="there are 12 colours"):
        render_segmentation(segments, 13)
    with pytest.raises(ValueError, match="uint8"):
        render_segmentation(segments.astype(int), 6)


def test_png_holds_the_pixels_and_nothing_else() -> None:
    picture = render_segmentation(voronoi(40, 50, 6), 6)
    content = to_png(picture)
    assert content == to_png(picture.copy())
    image = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(np.array(image), picture)
    assert image.info == {}


def test_contact_sheet_shows_every_picture_under_its_title() -> None:
    pictures = [[render_segmentation(voronoi(30, 30, n, seed), n) for n in (3, 5, 7, 9)] for seed in range(2)]
    sheet = contact_sheet(pictures, ["J = 3", "J = 5", "J = 7", "J = 9"])
    height, width = pictures[0][0].shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (height, width, 3))[:, :, 0]
    for picture in pictures[0] + pictures[1]:
        corner = (windows[..., :2, :2, :] == picture[:2, :2]).all((-1, -2, -3))
        assert any((windows[i, k] == picture).all() for i, k in zip(*np.nonzero(corner), strict=True))
    assert (sheet[:28] < 128).any()
    with pytest.raises(ValueError, match="a title for each column"):
        contact_sheet(pictures, ["J = 3"])


def test_does_not_import_torch() -> None:
    code = "import sys, lvlmva_core.render; print(sorted({'torch', 'zarr', 'dvc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []
