"""Estimators of scikit-learn whose hyperparameters, one for each feature or sample, are learned by hypergradients.

Import them from here: `from bilevel.sklearn import RidgeHO`. Needs `pip install "bilevel[sklearn]"`.
"""

try:
    import sklearn  # noqa: F401  # not this package: imports are absolute
except ImportError as error:
    raise ImportError('`bilevel.sklearn` needs scikit-learn. Run `pip install "bilevel[sklearn]"`.') from error

from bilevel.sklearn.elastic_net import ElasticNetHO as ElasticNetHO
from bilevel.sklearn.influence_scorer import InfluenceScorer as InfluenceScorer
from bilevel.sklearn.lasso import LassoHO as LassoHO
from bilevel.sklearn.logistic import LogisticRegressionHO as LogisticRegressionHO
from bilevel.sklearn.reweighting import SampleReweightingClassifier as SampleReweightingClassifier
from bilevel.sklearn.ridge import RidgeHO as RidgeHO
from bilevel.sklearn.svc import SVCHO as SVCHO
