"""The entries of feature spaces of one's own; no torch is imported here, so that a dry run is quick."""

from workers.kinds import SpaceEntry

RANDOM = SpaceEntry(function="convolutions:Convolutions", about="random convolutions", dimensions=32)
TAUGHT = SpaceEntry(
    function="convolutions:Convolutions",
    about="the same convolutions, taught to tell the labels of the data",
    train="convolutions:teach",
    dimensions=32,
    labelled=True,
)
