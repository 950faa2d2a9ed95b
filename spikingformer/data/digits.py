"""scikit-learn's handwritten digits: 1,797 real 8x8 scans that come with the library (nothing to download)."""

import numpy as np
import torch
import torch.nn.functional as F

from spikingformer.data.pictures import PictureSet, split_by_class

_SPLIT_SEED = 0
_TEST_FRACTION = 0.2  # 35 to 37 scans of each digit: 359 in all


def load_digits(part: str, image_size: int) -> PictureSet:
    """Training (1,438) or test (359) part, a fixed division by class; (N, 1, image_size, image_size).

    Scans (0..16) become 0..255 and are enlarged bilinearly.

    Raises:
        ValueError: `part` is not "train" or "test", or image_size < 8.
    """
    from sklearn.datasets import load_digits as load

    if image_size < 8:
        raise ValueError(f"data.image_size: got {image_size}, the digits are 8x8 scans; use 8 or more (16 works well)")
    bunch = load()
    labels = np.asarray(bunch.target, dtype=np.int64)
    train, test = split_by_class(labels, _TEST_FRACTION, _SPLIT_SEED)
    chosen = {"train": train, "test": test}[part]
    scans = torch.from_numpy(np.asarray(bunch.images[chosen], dtype=np.float32))[:, None] * (255.0 / 16.0)
    pictures = F.interpolate(scans, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return PictureSet(
        pictures.round().to(torch.uint8),
        torch.from_numpy(labels[chosen]),
        tuple(str(digit) for digit in range(10)),
        mean=(0.306,),  # of the 1,438 training scans, enlarged to 16x16
        std=(0.319,),
    )
