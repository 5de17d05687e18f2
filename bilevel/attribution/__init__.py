"""What a trained model owes to each of its training samples."""

from bilevel.attribution.influence import influence as influence
from bilevel.attribution.kfac import KFAC as KFAC
from bilevel.attribution.scores import Influence as Influence
