"""What only a density can do: densities made of densities, tilted and measured ones, samples that are accepted."""

from torchcdm.compose.combinations import all_of, any_of, none_of, tempered
from torchcdm.compose.rare import Probability, probability
from torchcdm.compose.sampling import Draws, sample
from torchcdm.compose.tilted import blur, downsampling, mask, posterior, tilted

__all__ = ["Draws", "Probability", "all_of", "any_of", "none_of", "probability", "sample", "tempered", "tilted"]
__all__ += ["blur", "downsampling", "mask", "posterior"]
