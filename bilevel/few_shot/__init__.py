"""Few-shot learning: training a learner over tasks, and evaluating it."""

from bilevel.few_shot.adapt import Adapted as Adapted, adapt as adapt, draws as draws, predict as predict
from bilevel.few_shot.calibration import (
    Calibration as Calibration,
    calibration as calibration,
    calibration_of as calibration_of,
    draw_reliability as draw_reliability,
)
from bilevel.few_shot.evaluate import Evaluation as Evaluation, Score as Score, evaluate as evaluate
from bilevel.few_shot.experiment import Experiment as Experiment
from bilevel.few_shot.networks import conv_net as conv_net, mlp as mlp
from bilevel.few_shot.train import Progress as Progress, Trained as Trained, train as train
from bilevel.few_shot.validate import Validation as Validation, read_best as read_best
