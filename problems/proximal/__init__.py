"""Recipes whose inner problem is a proximal algorithm on a sum of terms, one a file."""

from bilevel.problems.proximal.compressed_sensing_mri import (
    CompressedSensing as CompressedSensing,
    compressed_sensing_mri as compressed_sensing_mri,
)
from bilevel.problems.proximal.deblurring import Deblurring as Deblurring, deblurring as deblurring
from bilevel.problems.proximal.deraining import Deraining as Deraining, deraining as deraining
from bilevel.problems.proximal.energy_planning import (
    EnergyPlanning as EnergyPlanning,
    energy_planning as energy_planning,
)
from bilevel.problems.proximal.joint_optics import JointOptics as JointOptics, joint_optics as joint_optics
from bilevel.problems.proximal.learned_prior import LearnedPrior as LearnedPrior, learned_prior as learned_prior
