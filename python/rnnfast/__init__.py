"""rnnfast: recurrent networks on the CPU, fused and hand-written, from NumPy arrays.

>>> import numpy as np
>>> import rnnfast
>>> layer = rnnfast.LSTM(8, 16, num_layers=2, seed=0)
>>> y, (h, c) = layer(np.zeros((5, 3, 8), np.float32))
>>> y.shape
(5, 3, 16)

Layers: LSTM, GRU, RNN, NARX; Embedding, Linear, Dropout; Graph joins them. functional: the same without objects. reference: the equations in plain NumPy.
losses, optim, training, data, lm: from gradients to a trained model. Importing rnnfast imports NumPy alone.
"""

from . import functional, losses, optim
from ._core import get_num_threads, set_num_threads, target, targets, use_target
from .dense import Dropout, Embedding, Linear
from .graph import Graph
from .layers import GRU, LSTM, NARX, RNN, NarxStream, Stream
from .losses import mean_squared_error, softmax_cross_entropy
from .module import Module
from .optim import SGD, Adam, AdamW, RMSprop, clip_global_norm

__version__ = "0.1.0"

__all__ = [
    "GRU", "LSTM", "NARX", "RNN", "SGD", "Adam", "AdamW", "Dropout", "Embedding", "Graph", "Linear", "Module", "NarxStream", "RMSprop", "Stream",
    "clip_global_norm", "functional", "get_num_threads", "losses", "mean_squared_error", "optim", "set_num_threads", "softmax_cross_entropy", "target",
    "targets", "use_target",
]  # fmt: skip
