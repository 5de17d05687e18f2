"""Few-shot learning: training a learner over tasks, and evaluating it."""

from bilevel.few_shot.adapt import Adapted as Adapted, adapt as adapt, draws as draws, predict as predict
from bilevel.few_shot.calibration import (
    Calibration as Calibration,
    calibration as calibration,
    calibration_of as calibration_of,
    draw_reliability as draw_reliability,
)
from bilevel.few_shot.evaluate import Evaluation as Evaluation, Score as Score, evaluate as evaluate
from bilevel.few_shot.experiment import Experiment as Experiment, NamedExperiment as NamedExperiment
from bilevel.few_shot.learner import Learner as Learner
from bilevel.few_shot.likelihood import AbstractLikelihood as AbstractLikelihood
from bilevel.few_shot.networks import conv_net as conv_net, mlp as mlp
from bilevel.few_shot.options import (
    OuterLoop as OuterLoop,
    Reporting as Reporting,
    Saving as Saving,
    Validating as Validating,
)
from bilevel.few_shot.train import train as train
from bilevel.few_shot.trained import Progress as Progress, Trained as Trained
from bilevel.few_shot.training import Evaluating as Evaluating, Training as Training
from bilevel.few_shot.validate import Validation as Validation, read_best as read_best
