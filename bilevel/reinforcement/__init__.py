"""Policies that adapt: environments, surrogates of the return, MAML over policy gradients."""

from bilevel.reinforcement.bandit import GaussianBandit as GaussianBandit
from bilevel.reinforcement.baseline import (
    AbstractBaseline as AbstractBaseline,
    Advantages as Advantages,
    LinearBaseline as LinearBaseline,
    Zero as Zero,
)
from bilevel.reinforcement.categorical import CategoricalPolicy as CategoricalPolicy
from bilevel.reinforcement.dice import DiCE as DiCE
from bilevel.reinforcement.environment import AbstractEnvironment as AbstractEnvironment
from bilevel.reinforcement.gaussian import GaussianPolicy as GaussianPolicy
from bilevel.reinforcement.interaction import Interaction as Interaction
from bilevel.reinforcement.low_variance import (
    LowVarianceCurvature as LowVarianceCurvature,
    ScoreFunction as ScoreFunction,
)
from bilevel.reinforcement.maml_policy import maml_policy as maml_policy
from bilevel.reinforcement.meta_policy import MetaPolicy as MetaPolicy
from bilevel.reinforcement.navigation import Navigation as Navigation
from bilevel.reinforcement.offline import (
    Coverage as Coverage,
    ImportanceWeighted as ImportanceWeighted,
    OfflinePolicy as OfflinePolicy,
)
from bilevel.reinforcement.offline_tasks import OfflineTasks as OfflineTasks, collect as collect
from bilevel.reinforcement.point_mass import PointMass as PointMass
from bilevel.reinforcement.policy import AbstractPolicy as AbstractPolicy
from bilevel.reinforcement.surrogate import AbstractSurrogate as AbstractSurrogate
from bilevel.reinforcement.tabular import Tabular as Tabular
from bilevel.reinforcement.tasks import BanditTasks as BanditTasks, GoalTasks as GoalTasks
from bilevel.reinforcement.trajectories import Trajectories as Trajectories, rollout as rollout
from bilevel.reinforcement.trust_region import TrustRegion as TrustRegion
from bilevel.reinforcement.vector_episodes import vector_episodes as vector_episodes
