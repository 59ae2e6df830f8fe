"""Shapes and types of arrays, as words for annotations: within a call and within a record a letter is one number.

The tests check them wherever `workers.diffusion`, `workers.network` and `workers.evaluation` are entered
(tests/conftest.py); a run does not. What only one module speaks of is named there.
"""

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Shaped, UInt8, UInt16
from torch import Tensor

# Of a batch. Images are on the scale of [-1, 1], but for what a network says of them.
NCHW = Float[Tensor, "n c h w"]
Heads = Float[Tensor, "n heads h w"]  # a network's output: c channels, or 2 c where it learns a variance
Times = Int64[Tensor, "n"]  # t in 1..T
RealTimes = Int64[Tensor, "n"] | Float64[Tensor, "n"]  # t in [1, T]: between the trained times too
PerImage = Float[Tensor, "n"]
PerImage64 = Float64[Tensor, "n"]
Counts = Int64[Tensor, "n"]
Conditions = Int64[Tensor, "n"] | Float[Tensor, "n length width"]  # what a network is told: a label each, or vectors
Beside = Shaped[Tensor, "n ..."]  # numbers of each image, that multiply its pixels: (n, 1, 1, 1) or a pixel each

# Of a process: index t - 1.
PerTime = Float64[Tensor, "T"]

# Of a data set and of its feature space.
# In 0..levels-1, and in [-1, 1] where they are not discrete.
NHWC = UInt8[np.ndarray, "n h w c"] | UInt16[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"]
Features = Float[np.ndarray, "n d"]
