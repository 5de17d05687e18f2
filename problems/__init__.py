"""Bilevel problems with everything known about them, and their catalogue by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from bilevel._instance import Instance
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems._data import Arrays, Dataset
from bilevel.problems._sparse import SparseData, highest_penalty
from bilevel.problems.actor_critic import TabularMDP, actor_critic
from bilevel.problems.bayesian_regression import BayesianRegression, bayesian_regression
from bilevel.problems.cournot import CournotGame, cournot
from bilevel.problems.deep_equilibrium import deep_equilibrium
from bilevel.problems.hyper_cleaning import (
    HyperCleaning,
    hyper_cleaning,
    hyper_cleaning_batches,
    hyper_cleaning_synthetic,
)
from bilevel.problems.ill_posed import double_well, rank_deficient
from bilevel.problems.inverse_link import InverseLink, asinh, atanh, cardano, lambert
from bilevel.problems.log_sum_exp import LogSumExp, log_sum_exp
from bilevel.problems.logistic import Logistic, logistic, logistic_breast_cancer, multinomial_digits
from bilevel.problems.meta_learning import (
    GaussianLikelihood,
    GaussianPrior,
    KLDiagonal,
    KLProducts,
    KLSystem,
    MonteCarlo,
    OuterObjective,
    PosteriorDescent,
    abml,
    anil,
    ibaml,
    ibaml_head,
    imaml,
    maml,
    matching_net,
    no_inner_loop,
    proto_net,
    reptile,
    ridge_head,
    shared_embedding,
    svm_head,
)
from bilevel.problems.minimax import minimax
from bilevel.problems.nested import nested
from bilevel.problems.networks import byte_gpt, language_sources, python_texts
from bilevel.problems.networks.active_cells import active_cells
from bilevel.problems.networks.distillation import distillation
from bilevel.problems.networks.fair_classifier import fair_classifier
from bilevel.problems.networks.fair_meta_learning import fair_meta_learning
from bilevel.problems.networks.federated_cleaning import federated_cleaning
from bilevel.problems.networks.federated_maml import federated_maml
from bilevel.problems.networks.federated_representation import federated_representation
from bilevel.problems.networks.learned_augmentation import learned_augmentation
from bilevel.problems.networks.learning_to_optimize import learning_to_optimize
from bilevel.problems.networks.mislabelled_tasks import mislabelled_tasks
from bilevel.problems.networks.mixed_operations import mixed_operations
from bilevel.problems.networks.noisy_labels import noisy_labels
from bilevel.problems.networks.outlier_sinusoids import outlier_sinusoids
from bilevel.problems.networks.platinum import semi_supervised
from bilevel.problems.networks.replay import replay
from bilevel.problems.networks.representation import representation
from bilevel.problems.networks.small_network import small_network
from bilevel.problems.networks.task_weights import task_weights
from bilevel.problems.proximal_tasks import ProximalTasks, proximal_tasks
from bilevel.problems.quadratic import QuadraticFamily, quadratic, random_quadratic
from bilevel.problems.ridge import Ridge, ridge, ridge_diabetes, ridge_orthonormal, ridge_per_feature_diabetes
from bilevel.problems.sparse_regression import (
    elastic_net,
    elastic_net_diabetes,
    group_lasso,
    lasso,
    lasso_diabetes,
    sparse_logistic,
    weighted_lasso,
)
from bilevel.problems.support_vectors import svm, svr
from bilevel.problems.weighted_logit import WeightedLogit, weighted_logit

__all__ = [
    "Arrays",
    "BayesianRegression",
    "CournotGame",
    "Dataset",
    "Entry",
    "GaussianLikelihood",
    "GaussianPrior",
    "HyperCleaning",
    "Instance",
    "InverseLink",
    "KLDiagonal",
    "KLProducts",
    "KLSystem",
    "LogSumExp",
    "Logistic",
    "MonteCarlo",
    "OuterObjective",
    "PosteriorDescent",
    "ProximalTasks",
    "QuadraticFamily",
    "Ridge",
    "SparseData",
    "TabularMDP",
    "WeightedLogit",
    "abml",
    "active_cells",
    "actor_critic",
    "anil",
    "asinh",
    "atanh",
    "bayesian_regression",
    "byte_gpt",
    "cardano",
    "catalogue",
    "cournot",
    "deep_equilibrium",
    "distillation",
    "double_well",
    "elastic_net",
    "elastic_net_diabetes",
    "fair_classifier",
    "fair_meta_learning",
    "federated_cleaning",
    "federated_maml",
    "federated_representation",
    "group_lasso",
    "highest_penalty",
    "hyper_cleaning",
    "hyper_cleaning_batches",
    "hyper_cleaning_synthetic",
    "ibaml",
    "ibaml_head",
    "imaml",
    "lambert",
    "language_sources",
    "lasso",
    "lasso_diabetes",
    "learned_augmentation",
    "learning_to_optimize",
    "log_sum_exp",
    "logistic",
    "logistic_breast_cancer",
    "maml",
    "matching_net",
    "minimax",
    "mislabelled_tasks",
    "mixed_operations",
    "multinomial_digits",
    "nested",
    "no_inner_loop",
    "noisy_labels",
    "outlier_sinusoids",
    "proto_net",
    "proximal_tasks",
    "python_texts",
    "quadratic",
    "random_quadratic",
    "rank_deficient",
    "replay",
    "representation",
    "reptile",
    "ridge",
    "ridge_diabetes",
    "ridge_head",
    "ridge_orthonormal",
    "ridge_per_feature_diabetes",
    "semi_supervised",
    "shared_embedding",
    "small_network",
    "sparse_logistic",
    "svm",
    "svm_head",
    "svr",
    "task_weights",
    "weighted_lasso",
    "weighted_logit",
]


@final
@dataclass(frozen=True)
class Entry(AbstractPortable):
    """A problem that can be built by name.

    Attributes:
        name: what the command line calls it.
        description: one line.
        build: makes the problem; its keyword arguments are those that `--set` passes.
    """

    name: str
    description: str
    build: Callable[..., Instance]

    def __post_init__(self) -> None:
        demand_types(self)


_ENTRIES = (
    Entry("hyper-cleaning", "find mislabelled digits by learning a weight for each training sample", hyper_cleaning),
    Entry("hyper-cleaning-synthetic", "the same on random data of any size (benchmarks)", hyper_cleaning_synthetic),
    Entry(
        "logistic-breast-cancer",
        "logistic regression with learned penalties, breast cancer data",
        logistic_breast_cancer,
    ),
    Entry("multinomial-digits", "multinomial logistic regression with learned penalties, digits", multinomial_digits),
    Entry("small-network", "sample weights and decay of an MLP, a conv net or a transformer, digits", small_network),
    Entry("logistic", "logistic regression with learned penalties, random data of any size", logistic),
    Entry("ridge-diabetes", "ridge regression with one learned penalty, diabetes data", ridge_diabetes),
    Entry("ridge-per-feature-diabetes", "the same with a penalty for each feature", ridge_per_feature_diabetes),
    Entry("ridge", "ridge regression with learned penalties, random data", ridge),
    Entry("ridge-orthonormal", "ridge regression whose best penalties are known", ridge_orthonormal),
    Entry("lasso", "lasso with one learned penalty: held-out loss, cross-validation or SURE, generated data", lasso),
    Entry("weighted-lasso", "lasso with a learned penalty for each of a hundred features", weighted_lasso),
    Entry("lasso-diabetes", "lasso with learned penalties, diabetes data", lasso_diabetes),
    Entry("elastic-net", "elastic net with both penalties learned, by the same criteria, generated data", elastic_net),
    Entry("elastic-net-diabetes", "elastic net with both penalties learned, diabetes data", elastic_net_diabetes),
    Entry("group-lasso", "group lasso with a learned penalty, generated data", group_lasso),
    Entry("sparse-logistic", "logistic regression with a learned L1 penalty, breast cancer data", sparse_logistic),
    Entry("svm", "support vector machine with a learned cost, by its dual, breast cancer data", svm),
    Entry("svr", "support vector regression with learned cost and tube, by its dual, diabetes data", svr),
    Entry("proximal-tasks", "small regressions with a learned prior mean and precision (iMAML's form)", proximal_tasks),
    Entry(
        "bayesian-regression",
        "small Bayesian regressions with a learned Gaussian prior (iBaML's form)",
        bayesian_regression,
    ),
    Entry(
        "language-sources",
        "which sources of text, one of them corrupted, a byte-level GPT should be trained on",
        language_sources,
    ),
    Entry("federated-cleaning", "mislabelled digits of clients whose samples stay with them", federated_cleaning),
    Entry(
        "federated-representation", "a layer and a head that clients learn together, digits", federated_representation
    ),
    Entry("federated-maml", "a start that hundreds of devices adapt to a sinusoid each", federated_maml),
    Entry("quadratic", "quadratic objectives at both levels, prescribed spectrum", quadratic),
    Entry("nested", "quadratic objectives with x and y in nested structures", nested),
    Entry("minimax", "a saddle point: g = -f, the implicit term vanishes", minimax),
    Entry("asinh", "inner problem of the form cosh", asinh),
    Entry("lambert", "inner problem with an exponential, y* by Lambert's W", lambert),
    Entry("cardano", "quartic inner problem, y* by Cardano's formula", cardano),
    Entry("atanh", "inner curvature 1 - x^2, which vanishes at the ends", atanh),
    Entry("log-sum-exp", "coupled log-sum-exp inner problem", log_sum_exp),
    Entry("cournot", "taxes on firms whose Cournot equilibrium is a fixed point, closed forms", cournot),
    Entry("actor-critic", "a softmax actor and its critic, the fixed point of the Bellman equation", actor_critic),
    Entry("deep-equilibrium", "a deep equilibrium network, contractive by construction, two spirals", deep_equilibrium),
    Entry("weighted-logit", "sample weights on one logit: hyper-cleaning on paper", weighted_logit),
    Entry("noisy-labels", "weights of training samples with wrong labels, a convolutional network", noisy_labels),
    Entry(
        "learned-augmentation",
        "strengths of augmentations and parameters of the loss, a convolutional network",
        learned_augmentation,
    ),
    Entry(
        "mixed-operations", "which of the candidate operations made the data: mixing weights (DARTS)", mixed_operations
    ),
    Entry("distillation", "ten synthetic digits that train a fresh network", distillation),
    Entry("replay", "samples of earlier tasks that keep a network from forgetting them", replay),
    Entry(
        "representation",
        "ten million weights under a linear head, learned by forward passes and one backward",
        representation,
    ),
    Entry(
        "nested-maml-sinusoids",
        "weights of training tasks of which a share are no sinusoids (NestedMAML)",
        outlier_sinusoids,
    ),
    Entry(
        "nested-maml-images",
        "weights of the instances of few-shot tasks with wrong labels (NestedMAML), digits or Omniglot",
        mislabelled_tasks,
    ),
    Entry(
        "fair-meta-learning",
        "a start and a multiplier from which few steps give fair classifiers (PDFM), Gaussians, states or occupations",
        fair_meta_learning,
    ),
    Entry(
        "fair-classifier",
        "how far the covariance of a classifier with a group is to be bounded: the level of a constraint, by KKT",
        fair_classifier,
    ),
    Entry(
        "semi-supervised-images",
        "few-shot tasks with unlabelled images, chosen by submodular information (PLATINUM), digits or Omniglot",
        semi_supervised,
    ),
    Entry(
        "active-cells",
        "kinds of cells told apart after few labels, some asked for; augmented tasks, held dropout (AGILE)",
        active_cells,
    ),
    Entry(
        "learning-to-optimize",
        "an optimizer whose steps, preconditioner or small network is learned through its steps",
        learning_to_optimize,
    ),
    Entry(
        "rank-deficient",
        "singular inner Hessian: the hypergradient does not exist (a failure test)",
        rank_deficient,
    ),
    Entry("double-well", "nonconvex inner problem with two wells (a failure test)", double_well),
)


def catalogue() -> dict[str, Entry]:
    """Every problem by its name.

    Example:
        >>> catalogue()["quadratic"].build(p=2, q=3).x0.shape
        torch.Size([2])
    """
    return {entry.name: entry for entry in _ENTRIES}
