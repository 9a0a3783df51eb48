"""Decoding of any image file of 8 bits, as a conversion decodes it."""

from harma_ray.data.image_reading import read_picture
from harma_ray.data.images import MAX_PIXELS


def decode_image(data, max_pixels=MAX_PIXELS):
    return read_picture(data, max_pixels=max_pixels).image
