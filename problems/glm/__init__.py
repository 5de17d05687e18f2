"""Generalized linear models as inner objectives that know their own derivatives.

Import them from here: `from bilevel.problems.glm import GeneralizedLinearModel`.
"""

from bilevel.problems.glm.declare import declare as declare
from bilevel.problems.glm.losses import AbstractRowLoss as AbstractRowLoss, Poisson as Poisson, Softmax as Softmax
from bilevel.problems.glm.model import GeneralizedLinearModel as GeneralizedLinearModel
