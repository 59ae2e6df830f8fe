"""Protocols of papers: how they measured, as settings of `evaluation`, so that a number may stand beside theirs.

Each fixes the reference split, the number of samples, the sampler and the quantisation. What it does not fix is the
model's own. Nothing is dropped: an evaluation measures every sample and image that it is asked for.
"""

from collections.abc import Mapping
from typing import Any

PROFILES: dict[str, Mapping[str, Any]] = {
    # Ho et al. 2020, section 4: FID of 50,000 samples against the training split, all T ancestral steps; the bound on
    # the whole test split. Their code hands clipped floats to Inception; here, as ever, samples are bytes first.
    "ddpm-2020": {
        "nll": {"images": "all", "timesteps": "all"},
        "fid": {
            "samples": 50_000, "sampler": {"kind": "ancestral"}, "quantise": "round", "features": "inception",
            "reference": "train", "reference_images": "all", "also": ["kid"],
        },
    },
    # Dhariwal & Nichol 2021, appendix C: 50,000 samples against the training split, 250 ancestral steps; bytes by
    # truncation, as in their classifier_sample.py; precision and recall beside it.
    "adm": {
        "nll": None,
        "fid": {
            "samples": 50_000, "sampler": {"kind": "ancestral", "steps": 250}, "quantise": "truncate",
            "features": "inception", "reference": "train", "reference_images": "all", "also": ["precision_recall"],
        },
    },
    # Karras et al. 2022, section 5 and table 2: 50,000 samples against the training split by Heun's deterministic
    # sampler, 18 steps of rho = 7 and so 35 evaluations; for models of discrete time the levels move to the nearest
    # trained t, as in appendix C.3. They print the least of three; here it is one.
    "edm": {
        "nll": None,
        "fid": {
            "samples": 50_000, "sampler": {"kind": "heun", "steps": 18}, "quantise": "round",
            "features": "inception", "reference": "train", "reference_images": "all", "also": ["kid"],
        },
    },
}  # fmt: skip
