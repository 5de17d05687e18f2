"""Methods over tasks: a problem with the estimator and the adaptation that it is published with, as a `Learner`."""

from bilevel.problems.meta_learning.abml import abml as abml
from bilevel.problems.meta_learning.anil import anil as anil, no_inner_loop as no_inner_loop
from bilevel.problems.meta_learning.gaussian_likelihood import GaussianLikelihood as GaussianLikelihood
from bilevel.problems.meta_learning.gaussian_prior import GaussianPrior as GaussianPrior
from bilevel.problems.meta_learning.ibaml import ibaml as ibaml, ibaml_head as ibaml_head
from bilevel.problems.meta_learning.imaml import imaml as imaml
from bilevel.problems.meta_learning.kl_products import KLDiagonal as KLDiagonal, KLProducts as KLProducts
from bilevel.problems.meta_learning.kl_system import KLSystem as KLSystem
from bilevel.problems.meta_learning.maml import maml as maml
from bilevel.problems.meta_learning.matching_net import matching_net as matching_net
from bilevel.problems.meta_learning.monte_carlo import MonteCarlo as MonteCarlo
from bilevel.problems.meta_learning.outer_objective import OuterObjective as OuterObjective
from bilevel.problems.meta_learning.posterior_descent import PosteriorDescent as PosteriorDescent
from bilevel.problems.meta_learning.proto_net import proto_net as proto_net
from bilevel.problems.meta_learning.reptile import reptile as reptile
from bilevel.problems.meta_learning.ridge_head import ridge_head as ridge_head
from bilevel.problems.meta_learning.shared_embedding import shared_embedding as shared_embedding
from bilevel.problems.meta_learning.svm_head import svm_head as svm_head
