"""What the exchange of regions can be told."""

from lvlmva_core.settings import Count, Seed, Settings


class Exchange(Settings):
    """How regions are exchanged for the content of other pictures (an extension of LVLM-VA).

    n_donors: pictures of other classes, and as many of the own class, that each region is filled from. n_held_out: test
    pictures that the rejected regions are put into, after alignment. batch_size: pictures that are run at once.
    """

    n_donors: Count
    n_held_out: Count
    batch_size: Count
    seed: Seed
