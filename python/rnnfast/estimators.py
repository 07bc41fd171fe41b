"""RNNForecaster and RNNClassifier: scikit-learn estimators for tables of series. The only file that knows scikit-learn (the extra "sklearn").

A row of X is a series: X (N, W) with one number a step, or X (N, W, F) with F. What they compute is forecast.py's WindowNet.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .forecast import Settings, WindowNet

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("rnnfast.estimators needs scikit-learn: pip install 'rnnfast[sklearn]'") from error


class _WindowEstimator(BaseEstimator):  # type: ignore[misc]
    """What both share: the parameters, the windows."""

    def __init__(
        self, cell: str = "lstm", hidden_size: int = 32, num_layers: int = 1, *, bidirectional: bool = False, dropout: float = 0.0,
        learning_rate: float = 0.005, batch_size: int = 32, epochs: int = 60, validation_fraction: float = 0.1, patience: int = 10,
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.epochs = epochs
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state

    def _net(self) -> WindowNet:
        seed = self.random_state
        if isinstance(seed, np.random.RandomState):
            seed = int(seed.randint(2**31 - 1))
        return WindowNet(
            Settings(
                self.cell, self.hidden_size, self.num_layers, self.bidirectional, self.dropout, self.learning_rate, self.batch_size, self.epochs,
                self.validation_fraction, self.patience, None if seed is None else int(seed),
            )
        )  # fmt: skip

    def _windows(self, X: Any) -> Any:
        """X checked, as (N, W, F)."""
        check_is_fitted(self, "net_")
        X = validate_data(self, X, reset=False, dtype=np.float64, allow_nd=True)
        return X[..., None] if X.ndim == 2 else X


class RNNForecaster(RegressorMixin, _WindowEstimator):  # type: ignore[misc]
    """Numbers from series: y (N,) or (N, O), for instance the O steps that follow each window.

    cell "lstm", "gru" or "rnn"; hidden_size units in num_layers layers; trained by AdamW with a falling rate for at most `epochs` epochs. The last
    validation_fraction of the rows (from 20 rows on) judges the epochs; `patience` without a new best ends the training and the best weights are
    kept. score is R².

    Raises ValueError for data that scikit-learn's own estimators refuse too.

    >>> wave = np.sin(np.arange(300) / 5)
    >>> X = np.stack([wave[k : k + 10] for k in range(290)])
    >>> model = RNNForecaster(epochs=30, random_state=0).fit(X[:200], wave[10:210])
    >>> bool(model.score(X[200:], wave[210:]) > 0.95)
    True
    """

    def fit(self, X: Any, y: Any) -> RNNForecaster:
        """Trains on rows X (N, W) or (N, W, F) and y (N,) or (N, O). Returns itself."""
        X, y = validate_data(self, X, y, dtype=np.float64, allow_nd=True, multi_output=True, y_numeric=True)
        self._flat = np.ndim(y) == 1
        net = self._net()
        self.net_ = net.fit(X[..., None] if X.ndim == 2 else X, y.reshape(len(y), -1))
        self.n_iter_ = max(net.epochs, 1)
        return self

    def predict(self, X: Any) -> Any:
        """(N,) or (N, O), as y was."""
        windows = self._windows(X)
        y = self.net_(windows)
        return y[:, 0] if self._flat else y

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        tags.target_tags.multi_output = True
        tags.regressor_tags.poor_score = True  # a recurrent net on tables that are no series
        return tags


class RNNClassifier(ClassifierMixin, _WindowEstimator):  # type: ignore[misc]
    """A class for each series. Parameters as of RNNForecaster; y (N,) labels of any kind.

    >>> rng = np.random.default_rng(0)
    >>> slow, fast = (np.sin(w * np.arange(20) + rng.uniform(0, 6, (60, 1))) for w in (0.3, 0.9))
    >>> X, y = np.concatenate((slow, fast)), np.repeat(["slow", "fast"], 60)
    >>> bool(RNNClassifier(random_state=0).fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.9)
    True
    """

    def fit(self, X: Any, y: Any) -> RNNClassifier:
        """Trains on rows X (N, W) or (N, W, F) and labels y (N,). Returns itself."""
        X, y = validate_data(self, X, y, dtype=np.float64, allow_nd=True)
        check_classification_targets(y)
        self.classes_, of = np.unique(y, return_inverse=True)
        net = self._net()
        self.net_ = net.fit(X[..., None] if X.ndim == 2 else X, of.astype(np.int64), max(len(self.classes_), 1))
        self.n_iter_ = max(net.epochs, 1)
        return self

    def predict_log_proba(self, X: Any) -> Any:
        """(N, classes), in the order of classes_."""
        windows = self._windows(X)
        return self.net_(windows)

    def predict_proba(self, X: Any) -> Any:
        """(N, classes), in the order of classes_."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> Any:
        """The likeliest label of each row."""
        best = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[best]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        tags.classifier_tags.poor_score = True
        return tags
