"""Kinds of rows: a file each, and an entry here."""

from harma_ray.data.kinds.base import RowKind
from harma_ray.data.kinds.images import IMAGE_VECTORS, IMAGES
from harma_ray.data.kinds.talks import TALKS
from harma_ray.data.kinds.triplets import TRIPLET_VECTORS, TRIPLETS

KINDS: dict[str, RowKind] = {kind.name: kind for kind in (IMAGES, TRIPLETS, TALKS, IMAGE_VECTORS, TRIPLET_VECTORS)}
"""What the rows of a split can be, by the names that manifests give them."""
