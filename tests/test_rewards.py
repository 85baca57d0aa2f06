"""The built-in rewards against files that PIL writes."""

import pytest
import torch
from PIL import Image

from ddpo_trl.rewards import jpeg_compressibility, jpeg_incompressibility


def noise(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def incompressibility(images: torch.Tensor) -> list[float]:
    return jpeg_incompressibility(images, ("",) * len(images), ({},) * len(images))


def test_jpeg_size_is_that_of_the_file_pil_writes(tmp_path):
    height, width = 24, 40
    random = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, 3 * height * width).reshape(1, 3, height, width)
    images = torch.cat([random, ramp, torch.full_like(ramp, 0.5)])
    expected = []
    for index, image in enumerate(images):
        picture = Image.new("RGB", (width, height))
        for y in range(height):
            for x in range(width):
                red, green, blue = (round(value * 255) for value in image[:, y, x].tolist())
                picture.putpixel((x, y), (red, green, blue))
        picture.save(path := tmp_path / f"{index}.jpg", quality=95)
        expected.append(path.stat().st_size / 1000)
    assert incompressibility(images) == expected


def test_compressibility_is_minus_incompressibility():
    images = noise()
    assert jpeg_compressibility(images, ("",) * 3, ({},) * 3) == [-size for size in incompressibility(images)]


def test_a_blank_image_is_smaller_than_a_noisy_one():
    blank, noisy = incompressibility(torch.cat([torch.full((1, 3, 32, 32), 0.3), noise(1)]))
    assert 0 < blank < noisy / 2


def test_values_beyond_the_range_are_clamped():
    images = noise(1)
    beyond = torch.where(images > 0.5, images + 1.0, images - 1.0)
    assert incompressibility(beyond) == incompressibility((images > 0.5).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_black_and_white_images_score_the_same_in_every_dtype(dtype):
    images = (noise() > 0.5).float()
    assert incompressibility(images.to(dtype)) == incompressibility(images)


def test_gradients_of_the_images_do_not_matter():
    assert incompressibility(noise().requires_grad_()) == incompressibility(noise())
