"""Runs told to experiment trackers: callbacks of `minimize` for TensorBoard, MLflow and Weights & Biases.

Import them from here: `from bilevel.tracking import TensorBoard`. Each needs its package.
"""

from bilevel.tracking.mlflow import MLflow as MLflow
from bilevel.tracking.several import Several as Several
from bilevel.tracking.tensorboard import TensorBoard as TensorBoard
from bilevel.tracking.tracker import AbstractTracker as AbstractTracker
from bilevel.tracking.wandb import WandB as WandB
